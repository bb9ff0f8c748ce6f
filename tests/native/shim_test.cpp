// The CPU shim of CUDA (tests/shim): kernels that are right give one result in every order of their
// threads, and each kind of fault that it is there for is seen. A planted fault is a template
// argument, so that the right and the wrong kernel are the same text.
#include <stdlib.h>

#include <functional>
#include <set>
#include <string>

#include "check.h"
#include "cuda/platform.cuh"

namespace {

using namespace mbk::cuda;

struct Params {
  const float* x;
  float* y;
  unsigned* ticket;
  int n;
};

// ---- Kernels ---------------------------------------------------------------------------------

// y[block] = sum of n numbers: a tree in each warp, then one over the warps' sums.
template <bool kBarrier>
__global__ void __launch_bounds__(1024) block_sum(const __grid_constant__ Params p) {
  float* const sums = shared_memory<float>();
  float sum = 0;
  for (int i = (int)threadIdx.x; i < p.n; i += (int)blockDim.x) sum += p.x[blockIdx.x * p.n + i];
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if constexpr (kBarrier) __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0;
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (threadIdx.x == 0) p.y[blockIdx.x] = sum;
  }
}

// Half a warp at a time, each as often as it wants: y = sum over 16 threads, times what remains.
template <bool kWrongMask>
__global__ void half_warps(const __grid_constant__ Params p) {
  const unsigned half = threadIdx.x / 16, mask = 0xffffu << (half % 2 * 16);
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  double sum = p.x[i];
  for (unsigned round = 0; round <= half; ++round) {
    for (int step = 1; step < 16; step *= 2) {
      sum += __shfl_xor_sync(kWrongMask ? 0xffffffff : mask, sum, step, 16);
    }
    sum = __shfl_sync(mask, sum, 3, 16) / 16;
  }
  const bool any = __any_sync(mask, threadIdx.x % 16 == 5), all = __all_sync(mask, p.x[i] < 5);
  const unsigned low = __ballot_sync(mask, threadIdx.x % 16 < 2) >> (half % 2 * 16);
  p.y[i] = (float)(sum + any + 2 * all + 4 * low);
}

// y[i] = x[i of the next block of the cluster], through its shared memory.
enum ClusterFault { kNone, kNoBarrierBefore, kNoBarrierAfter, kNoWait, kRank };
template <ClusterFault kFault>
__global__ void cluster_rotate(const __grid_constant__ Params p) {
  float* const mine = shared_memory<float>();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  mine[threadIdx.x] = p.x[i];
  if constexpr (kFault != kNoBarrierBefore) cluster_sync();
  const unsigned next = kFault == kRank ? cluster_size() : (cluster_rank() + 1) % cluster_size();
  p.y[i] = cluster_map(mine, next)[threadIdx.x];
  if constexpr (kFault != kNoBarrierAfter) {
    cluster_arrive();
    if constexpr (kFault != kNoWait) cluster_wait();
    if constexpr (kFault == kNoWait) cluster_arrive();
  }
  mine[threadIdx.x] = -1;
}

// The last block to take a ticket sums what all blocks have written.
__global__ void last_block(const __grid_constant__ Params p) {
  int* const last = shared_memory<int>();
  p.y[1 + blockIdx.x] = p.x[blockIdx.x];
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicInc(p.ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += p.y[1 + b];
  p.y[0] = sum;
}

enum Mistake { kDiverged, kOtherBarrier, kEarlyReturn, kOutside, kMissingLane, kOverrun };
template <Mistake kMistake>
__global__ void mistaken(const __grid_constant__ Params p) {
  const unsigned t = threadIdx.x;
  if constexpr (kMistake == kDiverged) {
    if (t < 40) __syncthreads();
    __syncwarp();
  } else if constexpr (kMistake == kOtherBarrier) {
    if (t < 32) __syncthreads();
    if (t >= 32) __syncthreads();
  } else if constexpr (kMistake == kEarlyReturn) {
    if (t == 63) return;
    __syncthreads();
  } else if constexpr (kMistake == kOutside) {
    p.y[t] = __shfl_sync(0xffff, p.x[t], 0);
  } else if constexpr (kMistake == kMissingLane) {
    if (t % 32 != 7) __syncwarp();
  } else {
    shared_memory<float>()[p.n + (int)t] = 1;
  }
}

// What the kernel finds in its shared memory before it has written any.
__global__ void fresh_memory(const __grid_constant__ Params p) {
  unsigned* const memory = shared_memory<unsigned>();
  p.ticket[blockIdx.x * blockDim.x + threadIdx.x] = memory[threadIdx.x];
  memory[threadIdx.x] = 0;
}

// y = the place of each thread in the order in which they run.
__global__ void places(const __grid_constant__ Params p) {
  const unsigned place = atomicAdd(p.ticket, 1u);
  p.y[blockIdx.x * blockDim.x + threadIdx.x] = (float)place;
  if (place + 1 == gridDim.x * blockDim.x) *p.ticket = 0;
}

// ---- Running them ----------------------------------------------------------------------------

constexpr const char* kOrders[] = {"ascending", "descending", "random:1", "random:2", "random:3"};
constexpr unsigned kBlocks = 8, kThreads = 128;

float input(unsigned i) { return (float)(i * 37 % 101); }

// y after one launch, or the text of its fault.
struct Outcome {
  std::vector<float> y;
  std::string fault;
  bool operator<(const Outcome& o) const {
    return y.size() != o.y.size() ? y.size() < o.y.size()
                                  : memcmp(y.data(), o.y.data(), y.size() * sizeof(float)) < 0;
  }
};

Outcome run(void (*kernel)(Params), unsigned blocks, unsigned threads, unsigned cluster, int n,
            size_t shared_bytes) {
  std::vector<float> x(blocks * std::max(threads, (unsigned)n)), y(blocks * threads + 1);
  for (unsigned i = 0; i < x.size(); ++i) x[i] = input(i);
  unsigned ticket = 0;
  try {
    const cudaError_t error = launch(kernel, Params{x.data(), y.data(), &ticket, n}, blocks,
                                     threads, cluster, shared_bytes, nullptr);
    CHECK(error == cudaSuccess, "%s", cudaGetErrorString(error));
    CHECK(ticket == 0, "the ticket is %u", ticket);
  } catch (const shim::Fault& fault) {
    return {{}, fault.what()};
  }
  return {y, ""};
}
Outcome run(void (*kernel)(Params), unsigned cluster = 1, int n = (int)kThreads) {
  return run(kernel, kBlocks, kThreads, cluster, n, kThreads * sizeof(float));
}

int64_t launches = 0;
// The different outcomes in all orders.
std::set<Outcome> outcomes(const std::function<Outcome()>& f) {
  std::set<Outcome> all;
  for (const char* const order : kOrders) {
    setenv("MBKERN_SHIM_ORDER", order, 1);
    all.insert(f());
    ++launches;
  }
  return all;
}

// One outcome, and it is what `want` says for each y.
void check_right(const char* name, const std::function<Outcome()>& f,
                 const std::function<double(unsigned)>& want, unsigned count) {
  const auto all = outcomes(f);
  CHECK(all.size() == 1, "%s: %zu different results", name, all.size());
  const Outcome& outcome = *all.begin();
  CHECK(outcome.fault.empty(), "%s: %s", name, outcome.fault.c_str());
  for (unsigned i = 0; i < count && i < outcome.y.size(); ++i) {
    CHECK(outcome.y[i] == want(i), "%s: y[%u] is %g, not %g", name, i, outcome.y[i], want(i));
  }
}

// More than one outcome: the fault shows in the results.
void check_differs(const char* name, const std::function<Outcome()>& f) {
  CHECK(outcomes(f).size() > 1, "%s: not seen", name);
}

// Every order ends with a fault whose text has all of these.
void check_fault(const char* name, void (*kernel)(Params), const std::vector<const char*>& texts,
                 unsigned cluster = 1) {
  for (const char* const order : kOrders) {
    setenv("MBKERN_SHIM_ORDER", order, 1);
    const std::string fault = run(kernel, cluster).fault;
    ++launches;
    for (const char* const text : texts) {
      CHECK(fault.find(text) != std::string::npos, "%s, order %s: no \"%s\" in \"%s\"", name, order,
            text, fault.c_str());
    }
  }
}

void right_kernels() {
  for (const unsigned threads : {32u, 96u, 512u, 1024u}) {
    const int n = 1000;
    const auto want = [](unsigned block) {
      double sum = 0;  // of small integers: exact in any order
      for (unsigned i = 0; i < (unsigned)n; ++i) sum += input(block * (unsigned)n + i);
      return sum;
    };
    check_right("block_sum", [=] { return run(block_sum<true>, 5, threads, 1, n, 128); }, want, 5);
  }
  check_right(
      "half_warps", [] { return run(half_warps<false>); },
      [](unsigned i) {
        double sum = 0;
        bool all = true;
        for (unsigned k = i / 16 * 16; k < i / 16 * 16 + 16; ++k) {
          sum += input(k);
          all = all && input(k) < 5;
        }
        return (float)(sum / 16 + 1 + 2 * all + 12);
      },
      kBlocks * kThreads);
  for (const unsigned cluster : {1u, 2u, 8u}) {
    check_right(
        "cluster_rotate", [=] { return run(cluster_rotate<kNone>, cluster); },
        [=](unsigned i) {
          const unsigned block = i / kThreads, first = block / cluster * cluster;
          return input((first + (block - first + 1) % cluster) * kThreads + i % kThreads);
        },
        kBlocks * kThreads);
  }
  check_right(
      "last_block", [] { return run(last_block); },
      [](unsigned) {
        double sum = 0;
        for (unsigned b = 0; b < kBlocks; ++b) sum += input(b);
        return sum;
      },
      1);
}

void planted_faults() {
  check_differs("no __syncthreads", [] { return run(block_sum<false>); });
  check_differs("no cluster barrier before",
                [] { return run(cluster_rotate<kNoBarrierBefore>, 4); });
  check_differs("no cluster barrier after", [] { return run(cluster_rotate<kNoBarrierAfter>, 4); });
  check_fault("no cluster wait", cluster_rotate<kNoWait>, {"twice without a wait"}, 4);
  check_fault("a wrong rank", cluster_rotate<kRank>, {"no block of that rank", "shim_test.cpp:"},
              4);
  check_fault("overlapping masks", half_warps<true>, {"masks that overlap"});
  check_fault("diverged", mistaken<kDiverged>,
              {"every thread waits, or has ended", "__syncthreads at ", ": threads 0-39\n",
               "__syncwarp (mask ffffffff) at ", ": threads 40-63\n", "mask ffffffff"});
  check_fault("two barriers", mistaken<kOtherBarrier>, {"different barriers"});
  check_fault("early return", mistaken<kEarlyReturn>,
              {"every thread waits, or has ended", ": ended: threads 63"});
  check_fault("outside of the mask", mistaken<kOutside>, {"outside of its own mask"});
  check_fault("a lane is missing", mistaken<kMissingLane>,
              {"every thread waits, or has ended", "__syncwarp (mask ffffffff) at ",
               "threads 0-6 8-38 40", "ended: threads 7 39"});
  check_fault("overrun", mistaken<kOverrun>, {"behind its shared memory"});
}

void orders() {
  const unsigned count = kBlocks * kThreads;
  CHECK(outcomes([] { return run(places, 2); }).size() == 5, "two orders are the same");
  for (const bool up : {true, false}) {
    setenv("MBKERN_SHIM_ORDER", up ? "ascending" : "descending", 1);
    const std::vector<float> y = run(places, 2).y;
    for (unsigned i = 0; i < count; ++i) CHECK(y[i] == (up ? i : count - 1 - i), "%u: %g", i, y[i]);
  }
}

void memory() {
  setenv("MBKERN_SHIM_ORDER", "ascending", 1);
  std::vector<unsigned> found(4 * 32, 0);
  const Params params{nullptr, nullptr, found.data(), 0};
  CHECK(launch(fresh_memory, params, 4, 32, 1, 128, nullptr) == cudaSuccess, "not launched");
  for (const unsigned word : found) CHECK(word == 0xffffffff, "%08x", word);
}

void refused_launches() {
  const Params p{};
  const auto error = [&](unsigned blocks, unsigned threads, unsigned cluster, size_t bytes) {
    const cudaError_t result = launch(fresh_memory, p, blocks, threads, cluster, bytes, nullptr);
    CHECK(cudaPeekAtLastError() == result, "not remembered");
    CHECK(cudaGetLastError() == result && cudaGetLastError() == cudaSuccess, "not cleared");
    return result;
  };
  CHECK(error(0, 32, 1, 0) == cudaErrorInvalidConfiguration, "no block");
  CHECK(error(1, 1056, 1, 0) == cudaErrorInvalidConfiguration, "too many threads");
  CHECK(error(3, 32, 2, 0) == cudaErrorInvalidConfiguration, "half a cluster");
  CHECK(error(17, 32, 17, 0) == cudaErrorInvalidConfiguration, "too large a cluster");
  CHECK(error(1, 32, 1, 227 * 1024 + 1) == cudaErrorInvalidValue, "too much memory");
  setenv("MBKERN_SHIM_CAPABILITY", "8.6", 1);
  CHECK(error(2, 32, 2, 0) == cudaErrorInvalidConfiguration, "clusters of an older device");
  CHECK(error(1, 32, 1, 99 * 1024 + 1) == cudaErrorInvalidValue, "the memory of a newer device");
  unsetenv("MBKERN_SHIM_CAPABILITY");
}

}  // namespace

int main() {
  right_kernels();
  planted_faults();
  orders();
  memory();
  refused_launches();
  printf("shim_test: %lld launches in %zu orders, %d checks failed\n", (long long)launches,
         sizeof kOrders / sizeof *kOrders, test::failures);
  return test::failures != 0;
}
