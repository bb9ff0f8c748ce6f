#pragma once
// Sums of many numbers that are not losses of a running kernel: weights, and fp64 losses. Exact for
// fp32; for fp64 in the order of core/ordered_sum.h.
#include "core/ordered_sum.h"
#include "cuda/workspace.cuh"

namespace mbk::MBK_ISA {

inline constexpr int kReduceThreads = 256;

// Where a sum goes; what is null is not wanted.
struct Destination {
  double* value;  // times `times`
  double times;
  ExactSumState* into;  // added, exactly
  Result result;        // its loss, over the divisor
  Scalar divisor;
};

template <class T, class Source>
struct Reduce {
  Source source;  // of number i
  int64_t n;
  ExactSumState* total;  // zero before and after, where there is more than one block
  double* block_sums;    // fp64: one for each kPointwiseBlock numbers
  unsigned* done;        // zero before and after
  Destination to;
};

MBK_DEVICE void deliver(const Destination& to, ExactSumState& total) {
  if (to.into) {
    normalise(total);
    normalise(*to.into);
    merge(*to.into, total);
  }
  if (to.result.loss) store_result(to.result, total, read(to.divisor));
  if (to.value) *to.value = round_in_place(total, false) * to.times;
}
MBK_DEVICE void deliver(const Destination& to, double total) {
  if (to.result.loss) store_result(to.result, total, read(to.divisor));
  if (to.value) *to.value = total * to.times;
}

template <class T, class Source>
__global__ void __launch_bounds__(kReduceThreads, 2)
    reduce(const __grid_constant__ Reduce<T, Source> p) {
  struct Shared {
    ExactSumState total;
    int is_last;
  };
  Shared& shared = *shared_memory<Shared>();
  if constexpr (sizeof(T) == 4) {
    if (threadIdx.x == 0) clear(shared.total);
    __syncthreads();
    ThreadSum sum;
    for (int64_t i = (int64_t)blockIdx.x * kReduceThreads + threadIdx.x; i < p.n;
         i += (int64_t)gridDim.x * kReduceThreads)
      sum.add(p.source(i), shared.total);
    sum.flush_warp(shared.total);
    __syncthreads();
    if (threadIdx.x == 0) {
      normalise(shared.total);
      if (gridDim.x > 1) merge_atomically(*p.total, shared.total);
    }
    if (!is_last_block(p.done, &shared.is_last) || threadIdx.x != 0) return;
    if (gridDim.x > 1) {
      read_state(shared.total, *p.total);
      clear(*p.total);
      atomicExch(p.done, 0u);  // others have added to it as atomics only
    }
    deliver(p.to, shared.total);
  } else {
    constexpr int kHalf = kGroup / 2;  // a thread has lanes k and k + kHalf
    const int64_t warp = ((int64_t)blockIdx.x * kReduceThreads + threadIdx.x) / 32,
                  warps = (int64_t)gridDim.x * kReduceThreads / 32;
    const int64_t blocks = (p.n + kPointwiseBlock - 1) / kPointwiseBlock;
    for (int64_t block = warp; block < blocks; block += warps) {
      const int64_t begin = block * kPointwiseBlock;
      const int64_t end = begin + kPointwiseBlock < p.n ? begin + kPointwiseBlock : p.n;
      double low = 0, high = 0;
      for (int64_t i = begin + threadIdx.x % 32; i < end; i += kGroup) {
        low += p.source(i);
        if (i + kHalf < end) high += p.source(i + kHalf);
      }
      low += high;
      for (int offset = kHalf / 2; offset; offset /= 2)
        low += __shfl_xor_sync(kWholeWarp, low, offset);
      if (threadIdx.x % 32 == 0) p.block_sums[block] = low;
    }
    if (!is_last_block(p.done, &shared.is_last) || threadIdx.x != 0) return;
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block)
      total += ((const volatile double*)p.block_sums)[block];
    atomicExch(p.done, 0u);  // others have added to it as atomics only
    deliver(p.to, total);
  }
}

// ---- sources ------------------------------------------------------------------------------------

template <class T>
struct Array {
  const T* values;
  MBK_DEVICE T operator()(int64_t i) const { return values[i]; }
};
template <class T>
struct ItemWeights {
  RowArgs args;
  MBK_DEVICE T operator()(int64_t i) const { return item_weight<T>(args, i); }
};

}  // namespace mbk::MBK_ISA
