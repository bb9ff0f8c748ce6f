#include "cuda/pointwise_dense.cuh"

namespace mbk::MBK_ISA {

DenseKernel dense_kernel_bf16(int loss, const PointwiseArgs& args) {
  return find_dense<bf16>(PointwiseLosses{}, loss, args);
}

}  // namespace mbk::MBK_ISA
