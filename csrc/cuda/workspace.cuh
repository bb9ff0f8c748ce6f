#pragma once
// What a call keeps on the device while it runs, and how its last block ends it.
#include "core/store_result.h"
#include "cuda/calls.h"
#include "cuda/exact.cuh"

namespace mbk::MBK_ISA {

// Zero when a call's kernels begin, where they have more than one block. For fp64 there follow the
// losses of the items and the sums of their blocks.
struct Workspace {
  double divisor;  // of the mean; the caller reads it
  double class_weight_sum;
  unsigned weights_done, losses_done;  // blocks
  ExactSumState weights, total;
};
inline constexpr int64_t kWorkspaceBytes = 512;
static_assert(sizeof(Workspace) <= kWorkspaceBytes);

// Whether this is the last block to come here; the whole block calls it. What the others wrote
// before is then visible.
MBK_DEVICE bool is_last_block(unsigned* done, int* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *shared = gridDim.x == 1 || atomicAdd(done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return *shared;
}

// Adds a block's normalised state to one in global memory.
MBK_DEVICE void merge_atomically(ExactSumState& into, const ExactSumState& from) {
  for (int i = 0; i < kLimbs; ++i) AtomicAdd{}(into.limb[i], from.limb[i]);
  AtomicAdd{}(into.nan, from.nan);
  AtomicAdd{}(into.positive_infinity, from.positive_infinity);
  AtomicAdd{}(into.negative_infinity, from.negative_infinity);
}

// A state that other blocks have added to.
MBK_DEVICE void read_state(ExactSumState& to, const ExactSumState& from) {
  const volatile int64_t* source = (const volatile int64_t*)&from;
  for (int i = 0; i < (int)(sizeof to / sizeof(int64_t)); ++i) ((int64_t*)&to)[i] = source[i];
}

// The end of a call, by one thread: the loss from the exact total, which is used up.
MBK_DEVICE void finish(const Result& result, ExactSumState& total, double divisor) {
  if (result.loss_sum) {
    normalise(total);
    normalise(*result.loss_sum);
    merge(*result.loss_sum, total);
  }
  store_result(result, total, divisor);
}

}  // namespace mbk::MBK_ISA
