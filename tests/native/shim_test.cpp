// The CPU shim of CUDA (tests/shim): kernels that are right give one result in every order of their
// threads, and each kind of fault that it is there for is seen. A planted fault is a template
// argument, so that the right and the wrong kernel are the same text.
#include <stdlib.h>

#include "shim_run.h"

namespace {

using namespace test;

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
template <bool kFence>
__global__ void last_block(const __grid_constant__ Params p) {
  int* const last = shared_memory<int>();
  if (threadIdx.x == 1) p.y[1 + blockIdx.x] = p.x[blockIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kFence) __threadfence();
    *last = atomicInc(p.ticket, gridDim.x - 1) == gridDim.x - 1;
    if constexpr (kFence) __threadfence();
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
    shared_memory<float>()[kSharedBytes / 4 + t] = 1;
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
  if (place + 1 == gridDim.x * blockDim.x) atomicExch(p.ticket, 0u);
}

double wanted_sum(unsigned block, unsigned n) {
  double sum = 0;  // of small integers: exact in any order
  for (unsigned i = 0; i < n; ++i) sum += input(block * n + i);
  return sum;
}
double wanted_half_warp(unsigned i) {
  double sum = 0;
  bool all = true;
  for (unsigned k = i / 16 * 16; k < i / 16 * 16 + 16; ++k) {
    sum += input(k);
    all = all && input(k) < 5;
  }
  return (float)(sum / 16 + 1 + 2 * all + 4 * 3);
}
double wanted_rotation(unsigned i, unsigned cluster) {
  const unsigned block = i / kThreads, first = block / cluster * cluster;
  return input((first + (block - first + 1) % cluster) * kThreads + i % kThreads);
}

void threads_of_a_block() {
  for (const unsigned threads : {32u, 96u, 512u, 1024u}) {
    check_right(
        "block_sum", [=] { return run(block_sum<true>, 5, threads, 1, 1000, 128); },
        [](unsigned block) { return wanted_sum(block, 1000); }, 5);
  }
  check_wrong(
      "no __syncthreads", [] { return run(block_sum<false>, 5, 96, 1, 1000, 128); },
      [](unsigned block) { return wanted_sum(block, 1000); }, 5);
  check_right(
      "half_warps", [] { return run(half_warps<false>); }, wanted_half_warp, kBlocks * kThreads);
  check_fault("overlapping masks", half_warps<true>, {"masks that overlap"});
  check_right(
      "last_block", [] { return run(last_block<true>); },
      [](unsigned) {
        double sum = 0;
        for (unsigned b = 0; b < kBlocks; ++b) sum += input(b);
        return sum;
      },
      1);
  if (shim::races::kOn) {  // nothing else can tell
    check_wrong("no __threadfence", [] { return run(last_block<false>); }, nullptr, 0);
  }
}

void clusters() {
  for (const unsigned cluster : {1u, 2u, 4u, 8u}) {
    check_right(
        "cluster_rotate", [=] { return run(cluster_rotate<kNone>, cluster); },
        [=](unsigned i) { return wanted_rotation(i, cluster); }, kBlocks * kThreads);
  }
  const auto want = [](unsigned i) { return wanted_rotation(i, 4); };
  check_wrong(
      "no cluster barrier before", [] { return run(cluster_rotate<kNoBarrierBefore>, 4); }, want,
      kBlocks * kThreads);
  check_wrong(
      "no cluster barrier after", [] { return run(cluster_rotate<kNoBarrierAfter>, 4); }, want,
      kBlocks * kThreads);
  check_fault("no cluster wait", cluster_rotate<kNoWait>, {"twice without a wait"}, 4);
  check_fault("a wrong rank", cluster_rotate<kRank>, {"no block of that rank", "shim_test.cpp:"},
              4);
}

void mistakes() {
  const char* const deadlock = "every thread waits, or has ended";
  check_fault("diverged", mistaken<kDiverged>,
              {deadlock, "__syncthreads at ", "shim_test.cpp:", ": threads 0-39\n",
               "__syncwarp (mask ffffffff) at ", ": threads 40-63\n"});
  check_fault("two barriers", mistaken<kOtherBarrier>, {"different barriers"});
  check_fault("early return", mistaken<kEarlyReturn>, {deadlock, ": ended: threads 63"});
  check_fault("outside of the mask", mistaken<kOutside>, {"outside of its own mask"});
  check_fault(
      "a lane is missing", mistaken<kMissingLane>,
      {deadlock, "__syncwarp (mask ffffffff) at ", "threads 0-6 8-38 40", "ended: threads 7 39"});
  check_fault("overrun", mistaken<kOverrun>, {"behind its shared memory"});
}

void orders() {
  const unsigned count = kBlocks * kThreads;
  CHECK(outcomes([] { return run(places, 2); }).size() == kOrders.size(),
        "two orders are the same");
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
  setenv("MBKERN_SHIM_COMPILED_FOR", "8.0", 1);
  CHECK(error(2, 32, 2, 0) == cudaErrorInvalidConfiguration, "clusters of code that has none");
  unsetenv("MBKERN_SHIM_COMPILED_FOR");
}

}  // namespace

int main() {
  threads_of_a_block();
  clusters();
  mistakes();
  test::copies();
  orders();
  memory();
  refused_launches();
  printf("shim_test: %lld launches in %zu orders, %d checks failed\n", (long long)launches,
         kOrders.size(), test::failures);
  return test::failures != 0;
}
