#include "cuda/row_kernels.cuh"

namespace mbk::MBK_ISA {

RowKernels row_kernels_bf16(int loss, const RowArgs& a) {
  return find_row_kernels<bf16>(RowLosses{}, loss, a);
}

}  // namespace mbk::MBK_ISA
