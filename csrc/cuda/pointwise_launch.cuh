#pragma once
// What the kernels of element-wise losses share: their parameters, and how a call ends.
#include "core/merged_shape.h"
#include "cuda/workspace.cuh"

namespace mbk::MBK_ISA {

inline constexpr int kPointwiseThreads = 256;

struct PointwiseLaunch {
  PointwiseArgs args;
  Result result;
  Workspace* work;
  double* terms;         // of fp64 losses, one an element, to be summed in order; may be null
  bool totals, vectors;  // vectors: every view is dense, and aligned for 4 elements at once
};
typedef void (*PointwiseKernel)(PointwiseLaunch);

struct PointwiseShared {
  ExactSumState total;
  int is_last;
};
inline constexpr size_t kPointwiseSharedBytes = sizeof(PointwiseShared) + 8;

// By the whole block, which has added what it holds to its total.
MBK_DEVICE void finish_pointwise(const PointwiseLaunch& p, PointwiseShared& shared) {
  __syncthreads();
  if (p.totals && threadIdx.x == 0) {
    normalise(shared.total);
    if (gridDim.x > 1) merge_atomically(p.work->total, shared.total);
  }
  if (!is_last_block(&p.work->losses_done, &shared.is_last) || threadIdx.x != 0) return;
  const double divisor = read(p.args.denominator);
  if (p.totals) {
    if (gridDim.x > 1) read_state(shared.total, p.work->total);
    finish(p.result, shared.total, divisor);
  }
  p.work->divisor = divisor;
}

}  // namespace mbk::MBK_ISA

namespace mbk::cuda {

// The kernel of a call as nearly all are (pointwise_dense.cuh), one file a storage type; null if
// the loss's parameters are unusual, or a third tensor is absent.
struct DenseKernel {
  PointwiseKernel run = nullptr;
  int (*blocks)(int capability) = nullptr;  // that a multiprocessor holds
};
DenseKernel dense_kernel_f32(int loss, const PointwiseArgs& args);
DenseKernel dense_kernel_bf16(int loss, const PointwiseArgs& args);
DenseKernel dense_kernel_f16(int loss, const PointwiseArgs& args);
inline constexpr int kDenseElements = 8;  // that a thread takes at once

}  // namespace mbk::cuda
