// Proves that the shared headers compile for CUDA, and calls every elementary function on the
// device in fp32 and fp64. The drivers follow.
#include "core/lane.h"
#include "core/math.h"
#include "core/math64.h"
#if __has_include("losses/all.h")
#include "losses/all.h"
#endif

namespace mbk::MBK_ISA {
namespace {

// y holds eight results for each of the n inputs, function after function.
template <class T>
__global__ void elementary(const T* x, T* y, int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const T v = x[i];
  const T results[] = {exp_nonpositive(v), exp(v),     expm1(v),    log(v),
                       log1p(v),           sigmoid(v), softplus(v), tanh(v)};
  for (const T result : results) {
    y[i] = result;
    y += n;
  }
}
template __global__ void elementary<float>(const float*, float*, int64_t);
template __global__ void elementary<double>(const double*, double*, int64_t);

}  // namespace
}  // namespace mbk::MBK_ISA
