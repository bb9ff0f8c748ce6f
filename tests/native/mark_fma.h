#pragma once
// Included before a CUDA source by tests/contraction.py: every fma that the source asks for carries
// a mark in the PTX. What has none was made by the compiler.
#include <cuda_runtime.h>

__device__ __forceinline__ float marked_fma(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;  // asked for" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}
__device__ __forceinline__ double marked_fma(double a, double b, double c) {
  double r;
  asm("fma.rn.f64 %0, %1, %2, %3;  // asked for" : "=d"(r) : "d"(a), "d"(b), "d"(c));
  return r;
}
#define __fmaf_rn marked_fma
#define __fma_rn marked_fma
