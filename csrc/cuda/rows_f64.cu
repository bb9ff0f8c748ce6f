#include "cuda/row_kernels.cuh"

namespace mbk::MBK_ISA {

RowKernels row_kernels_f64(int loss, const RowArgs& a) {
  return find_row_kernels<double>(RowLosses{}, loss, a);
}

}  // namespace mbk::MBK_ISA
