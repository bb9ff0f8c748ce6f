// Asynchronous copies: a pipeline of bulk loads and stores, and one of a thread's own loads.
#include "shim_run.h"

namespace test {
namespace {

enum CopyFault {
  kNone,
  kNoWait,
  kWrongParity,
  kTooFewBytes,
  kNoInit,
  kEarlyRefill,
  kNoFence,
  kEarlyOverwrite,
  kWaitForTooFew,
  kNoFinalWait,
  kMisaligned,
  kOutside,
  kNoBarrier,
};

struct Stages {
  float in[2][kThreads], out[2][kThreads];
  Barrier full[2];
};
static_assert(sizeof(Stages) <= kSharedBytes);

// y = x + 1 for n numbers of each block, with two loads and two stores under way.
template <CopyFault kFault>
__global__ void bulk_pipeline(const __grid_constant__ Params p) {
  Stages& s = *shared_memory<Stages>();
  const unsigned t = threadIdx.x, tiles = (unsigned)p.n / kThreads, first = blockIdx.x * tiles;
  constexpr unsigned kBytes = kThreads * sizeof(float);
  const auto load = [&](unsigned i) {
    if (t != 0 || i >= tiles) return;
    s.full[i % 2].arrive_expect(kFault == kTooFewBytes ? kBytes - 16 : kBytes);
    bulk_load(s.in[i % 2] + (kFault == kOutside      ? 512u
                             : kFault == kMisaligned ? 1u
                                                     : 0u),
              p.x + (first + i) * kThreads, kBytes, &s.full[i % 2]);
  };
  if (t == 0 && kFault != kNoInit) {
    s.full[0].init(1);
    s.full[1].init(1);
  }
  __syncthreads();
  load(0);
  load(1);
  __syncthreads();
  for (unsigned i = 0; i < tiles; ++i) {
    const unsigned parity = i / 2 % 2 ^ (kFault == kWrongParity);
    if constexpr (kFault != kNoWait) s.full[i % 2].wait(parity);
    const float x = s.in[i % 2][t];
    if constexpr (kFault == kEarlyRefill) load(i + 2);
    if (t == 0 && kFault != kEarlyOverwrite) bulk_wait<kFault == kWaitForTooFew ? 2 : 1>();
    __syncthreads();
    s.out[i % 2][t] = x + 1;
    if constexpr (kFault != kNoFence) fence_async();
    __syncthreads();
    if (t == 0) {
      bulk_store(p.y + (first + i) * kThreads, s.out[i % 2], kBytes);
      bulk_commit();
    }
    if constexpr (kFault != kEarlyRefill) load(i + 2);
  }
  if (t == 0 && kFault != kNoFinalWait) bulk_wait<0>();
}

// The same with loads of 16 bytes by each of a warp's threads, for its own use after a barrier.
template <CopyFault kFault>
__global__ void async_pipeline(const __grid_constant__ Params p) {
  float* const stages = shared_memory<float>();
  const int t = (int)threadIdx.x, tiles = p.n / 128, first = (int)blockIdx.x * tiles;
  const auto load = [&](int i) {
    if (i < tiles) async_load(stages + i % 3 * 128 + 4 * t, p.x + (first + i) * 128 + 4 * t);
    async_commit();
  };
  load(0);
  load(1);
  for (int i = 0; i < tiles; ++i) {
    load(i + 2);
    if constexpr (kFault != kNoWait) async_wait<kFault == kWaitForTooFew ? 3 : 2>();
    if constexpr (kFault != kNoBarrier) __syncwarp();
    for (int k = 0; k < 4; ++k) {
      p.y[(first + i) * 128 + 32 * k + t] = stages[i % 3 * 128 + 32 * k + t] + 1;
    }
    __syncwarp();
  }
}

constexpr int kTiles = 5, kEach = kTiles * (int)kThreads;
constexpr unsigned kAll = kBlocks * kEach;
double wanted(unsigned i) { return input(i) + 1; }

}  // namespace

void copies() {
  const auto right = [](const char* name, void (*bulk)(Params)) {
    check_right(name, [=] { return run(bulk, 1, kEach); }, wanted, kAll);
  };
  const auto wrong = [](const char* name, void (*bulk)(Params), int tiles) {
    const int n = tiles * (int)kThreads;
    check_wrong(name, [=] { return run(bulk, 1, n); }, wanted, kBlocks * (unsigned)n);
  };
  const auto fault = [](const char* name, void (*bulk)(Params), const char* text) {
    check_fault(name, bulk, {text, "shim_test_copies.cpp:"}, 1, kEach);
  };
  right("bulk copies", bulk_pipeline<kNone>);
  wrong("a bulk load into what is still read", bulk_pipeline<kEarlyRefill>, kTiles);
  wrong("the source of a bulk store overwritten", bulk_pipeline<kEarlyOverwrite>, kTiles);
  wrong("a wait for too few bulk stores", bulk_pipeline<kWaitForTooFew>, kTiles);
  fault("no wait for a bulk load", bulk_pipeline<kNoWait>, "phase nobody has waited for");
  fault("a wait for another phase", bulk_pipeline<kWrongParity>, "phase nobody has waited for");
  check_fault("no wait at all", bulk_pipeline<kNoWait>, {"before its bulk loads have arrived"}, 1,
              2 * (int)kThreads);
  fault("fewer bytes than come", bulk_pipeline<kTooFewBytes>, "Barrier::wait at");
  fault("no init", bulk_pipeline<kNoInit>, "a Barrier that has not been initialised");
  fault("no fence before a store", bulk_pipeline<kNoFence>, "without a fence_async");
  fault("no wait at the end", bulk_pipeline<kNoFinalWait>, "ends before its bulk stores");
  fault("a bad alignment", bulk_pipeline<kMisaligned>, "not aligned to 16");
  fault("outside of shared memory", bulk_pipeline<kOutside>, "not within shared memory");

  const auto async = [](void (*kernel)(Params)) {
    return [=] { return run(kernel, kBlocks, 32, 1, kEach, 3 * 512); };
  };
  check_right("loads of 16 bytes", async(async_pipeline<kNone>), wanted, kAll);
  check_wrong("no wait for a load", async(async_pipeline<kNoWait>), wanted, kAll);
  check_wrong("a wait for too few loads", async(async_pipeline<kWaitForTooFew>), wanted, kAll);
  check_wrong("no barrier behind the wait", async(async_pipeline<kNoBarrier>), wanted, kAll);
}

}  // namespace test
