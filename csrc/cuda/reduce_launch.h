#pragma once
// Launching sums, and the memory of a call. Host code.
#include <algorithm>
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/reduce.cuh"

namespace mbk::cuda {

inline constexpr int64_t kSpareBlockSums = 1024;  // for class weights, of which there may be more

inline int64_t block_sums(int64_t n) { return (n + kPointwiseBlock - 1) / kPointwiseBlock; }

// The workspace of a call; for fp64 with the losses of its items and the sums of their blocks.
struct Work {
  Workspace* const state;
  double *const losses, *const sums;
  const int64_t sums_size;
  const cudaStream_t stream;

  Work(const Queue& queue, int64_t items)
      : state(static_cast<Workspace*>(queue.workspace)),
        losses(reinterpret_cast<double*>(static_cast<char*>(queue.workspace) + kWorkspaceBytes)),
        sums(losses + items),
        sums_size(block_sums(items) + kSpareBlockSums),
        stream(stream_of(queue)) {}
  void clear() const {
    check(cudaMemsetAsync(state, 0, sizeof *state, stream), "clearing a workspace");
  }
};

// Sums one after the other use the same memory, which each leaves as it was.
template <class T, class Source>
void launch_reduce(const Work& work, const Source& source, int64_t n, const Destination& to) {
  if (sizeof(T) == 8 && block_sums(n) > work.sums_size)
    throw std::runtime_error("mbkern: too many fp64 weights for a CUDA device");
  const int64_t each =
      sizeof(T) == 8 ? kPointwiseBlock * (kReduceThreads / 32) : kReduceThreads * 8;
  const int64_t wanted = std::max<int64_t>(1, (n + each - 1) / each);
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(wanted, int64_t{4} * current_device().multiprocessors));
  const Reduce<T, Source> p{source, n, &work.state->weights, work.sums, &work.state->weights_done,
                            to};
  check(launch(&reduce<T, Source>, p, blocks, kReduceThreads, 1, sizeof(ExactSumState) + 16,
               work.stream),
        "launching a sum");
}

}  // namespace mbk::cuda
