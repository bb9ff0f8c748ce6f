#pragma once
// The host functions of CUDA's runtime that csrc/cuda uses. Streams run at once; device memory is
// the host's. The device can be chosen: MBKERN_SHIM_CAPABILITY (default 9.0) and
// MBKERN_SHIM_MULTIPROCESSORS (default 4), read at each question; so can what the kernels were
// compiled for: MBKERN_SHIM_COMPILED_FOR (default: the device). Code for less than 9.0 knows of no
// clusters: on a GPU their launch would succeed, and the results would be wrong; here it is
// refused.
#include <stddef.h>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrClusterLaunch,
  cudaDevAttrL2CacheSize,
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated,
};
typedef struct CUstream_st* cudaStream_t;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);

// A __device__ variable is a variable.
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, const T& symbol) {
  *address = (void*)&symbol;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, size_t bytes, size_t offset = 0,
                                 cudaMemcpyKind = cudaMemcpyDeviceToHost) {
  return cudaMemcpy(to, (const char*)&symbol + offset, bytes, cudaMemcpyDefault);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice) {
  return cudaMemcpy((char*)&symbol + offset, from, bytes, cudaMemcpyDefault);
}
template <class T>
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const T& symbol, size_t bytes, size_t offset,
                                      cudaMemcpyKind, cudaStream_t) {
  return cudaMemcpyFromSymbol(to, symbol, bytes, offset);
}
template <class T>
cudaError_t cudaMemcpyToSymbolAsync(T& symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset);
}

namespace shim {
int compiled_for();  // 90: 9.0
cudaError_t max_active_blocks(int* blocks, int threads, size_t shared_bytes);
cudaError_t max_active_clusters(int* clusters, int threads, size_t shared_bytes, int cluster);
// Remembers the error for cudaGetLastError.
cudaError_t result(cudaError_t error);
// Whether the device could run blocks of this kind at all.
cudaError_t check_launch(unsigned blocks, unsigned threads, unsigned cluster, size_t shared_bytes);
}  // namespace shim

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads,
                                                          size_t shared_bytes) {
  return shim::max_active_blocks(blocks, threads, shared_bytes);
}
