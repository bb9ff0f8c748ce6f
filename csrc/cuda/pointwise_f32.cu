#include "cuda/pointwise_dense.cuh"

namespace mbk::MBK_ISA {

DenseKernel dense_kernel_f32(int loss, const PointwiseArgs& args) {
  return find_dense<float>(PointwiseLosses{}, loss, args);
}

}  // namespace mbk::MBK_ISA
