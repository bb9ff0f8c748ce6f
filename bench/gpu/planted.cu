// Writes behind the end of its memory. A sanitizer that does not see it sees nothing.
#include <cuda_runtime.h>
#include <stdio.h>

__global__ void write(int* x) { x[256 + threadIdx.x] = 1; }

int main() {
  int* x = nullptr;
  if (cudaMalloc(&x, 256 * sizeof(int)) != cudaSuccess) return 1;
  write<<<1, 32>>>(x);
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
