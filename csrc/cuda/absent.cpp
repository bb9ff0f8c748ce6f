// In place of the kernels, in a build without CUDA. No tensor on CUDA gets past the checks of such
// a build, so only a direct call ends here.
#include <stdexcept>

#include "core/tensor_list.h"
#include "cuda/calls.h"

namespace mbk::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "mbkern: this build has kernels for CPU tensors only; install with MBKERN_CUDA=ON");
}

}  // namespace

int64_t workspace_bytes(int64_t, bool) { refuse(); }
void run_row_loss(const Queue&, int, DType, RowArgs, const Result&) { refuse(); }
void run_pointwise_loss(const Queue&, int, DType, PointwiseArgs, const Result&) { refuse(); }
void run_multirow_loss(const Queue&, int, DType, MultirowArgs, const Result&) { refuse(); }
int64_t list_workspace_bytes(int64_t, int64_t) { refuse(); }
void run_accumulate(const Queue&, AccumulateArgs, double*) { refuse(); }
void run_flush(const Queue&, FlushArgs, double, double*, double*) { refuse(); }
void scale_array(const Queue&, void*, DType, int64_t, const Scalar&, const Scalar&, bool) {
  refuse();
}
void convert_array(const Queue&, const void*, DType, void*, DType, int64_t) { refuse(); }
bool run_product(const Queue&, const ProductArgs&) { refuse(); }
void exact_result(const Queue&, const ExactSumState*, const Result&) { refuse(); }
void exact_merge(const Queue&, ExactSumState*, const ExactSumState*) { refuse(); }
void exact_add(const Queue&, ExactSumState*, const float*, int64_t) { refuse(); }
bool elementary(const Queue&, const char*, bool, const void*, void*, int64_t) { refuse(); }
void use_device(int) { refuse(); }
TargetErrors take_target_errors() { refuse(); }

}  // namespace mbk::cuda
