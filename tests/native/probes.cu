// Kernels with one planted fault each, and kernels with none, for tests/test_machine_code.py: what
// the checks of machine code must see, and what they must let pass.
#include <cuda_fp16.h>
#include <stdint.h>

#define PROBE extern "C" __global__ void

// ---- Nothing wrong ------------------------------------------------------------------------------

PROBE good_float(float* x, float y) {
  x[0] = x[0] / y;
  x[1] = sqrtf(x[1]) + __frcp_rn(x[2]);
  x[3] = __fmaf_rn(x[3], y, x[4]);
}
PROBE good_double(double* x, double y) {
  x[0] = x[0] / y;
  x[1] = sqrt(x[1]);
  x[2] = __fma_rn(x[2], y, x[3]);
}
PROBE good_integer(int64_t* x, int32_t* y, uint32_t* z) {
  x[0] = x[0] / x[1] + x[0] % x[2];
  y[0] = y[0] / y[1] + y[0] % y[2];
  z[0] = z[0] / z[1];
}
PROBE good_convert(const __half* x, float* y, __half* z) {
  const int i = threadIdx.x;
  y[i] = __half2float(x[i]);
  z[i] = __float2half_rn(y[i] + 1);
}
PROBE good_wide(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
PROBE good_atomic(unsigned long long* x) { atomicAdd(x, 3); }

// ---- One fault each -----------------------------------------------------------------------------

PROBE bad_contraction(float* x, float y) { x[0] = x[1] * y + x[2]; }
PROBE bad_exponential(float* x) { x[0] = __expf(x[0]); }
PROBE bad_logarithm(float* x) { x[0] = __logf(x[0]); }
PROBE bad_division(float* x, float y) { x[0] = __fdividef(x[0], y); }
PROBE bad_half(__half2* x, __half2 y) { x[0] = __hadd2(x[0], y); }
PROBE bad_half_fma(__half2* x, __half2 y) { x[0] = __hfma2(x[0], y, y); }
PROBE bad_atomic(float* x, float y) { atomicAdd(x, y); }
PROBE bad_index(const int* index, float* y) {
  float a[32] = {};
  for (int k = 0; k < 64; ++k) a[index[k] & 31] += y[k];
  for (int k = 0; k < 32; ++k) y[k] = a[k];
}
PROBE bad_narrow(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
// More numbers alive at once than the 32 registers that two blocks of 1024 threads leave a thread.
extern "C" __global__ void __launch_bounds__(1024, 2) bad_spill(const float* x, float* y) {
  float a[64];
  for (int k = 0; k < 64; ++k) a[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
  for (int k = 0; k < 64; ++k) y[k * 1024 + threadIdx.x] = a[(k * 37) % 64] * a[63 - k];
}
