#pragma once
// Which kernel computes a call of a row loss, and how it is launched. Host code; nothing here can
// change a bit of the result.
#include "cuda/device.h"
#include "cuda/row_launch.cuh"

namespace mbk::cuda {

using RowKernel = void (*)(RowLaunch);
struct RowKernels {
  RowKernel resident, reread, items;  // resident: null if this loss and type have none
};
RowKernels row_kernels_f32(int loss, const RowArgs& args);
RowKernels row_kernels_bf16(int loss, const RowArgs& args);
RowKernels row_kernels_f16(int loss, const RowArgs& args);
RowKernels row_kernels_f64(int loss, const RowArgs& args);

struct RowPlan {
  RowKernel kernel;
  unsigned blocks, threads, cluster;
  size_t shared_bytes;
};
// Fills in the fields of `launch` that say how teams share the rows.
RowPlan plan_rows(const Device& device, int loss, DType input, RowLaunch& launch);

}  // namespace mbk::cuda
