#include "host_api.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

namespace shim {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

struct Device {
  int major = 9, minor = 0, multiprocessors = 4;
  Device() {
    if (const char* text = getenv("MBKERN_SHIM_CAPABILITY")) sscanf(text, "%d.%d", &major, &minor);
    if (const char* text = getenv("MBKERN_SHIM_MULTIPROCESSORS")) multiprocessors = atoi(text);
  }
  // The table "Technical Specifications per Compute Capability" of the CUDA programming guide.
  bool small() const { return (major == 8 && minor > 0) || major == 12; }
  int shared_per_block() const { return (small() ? 99 : major == 8 ? 163 : 227) * 1024; }
  int shared() const { return shared_per_block() + 1024; }
  int threads() const { return small() ? 1536 : 2048; }
};

}  // namespace

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int compiled_for() {
  const Device device;
  int major = device.major, minor = device.minor;
  if (const char* text = getenv("MBKERN_SHIM_COMPILED_FOR")) sscanf(text, "%d.%d", &major, &minor);
  return 10 * major + minor;
}

cudaError_t max_active_blocks(int* blocks, int threads, size_t shared_bytes) {
  const Device device;
  if (threads < 1 || threads > 1024) return result(cudaErrorInvalidValue);
  const int padded = (threads + 31) / 32 * 32;
  const int by_threads = std::min(32, device.threads() / padded);
  const int by_memory = device.shared() / (int)(shared_bytes + 1024);  // the system keeps 1 KB
  *blocks = std::min(by_threads, by_memory);
  return cudaSuccess;
}

cudaError_t max_active_clusters(int* clusters, int threads, size_t shared_bytes, int cluster) {
  int blocks = 0;
  const cudaError_t error = max_active_blocks(&blocks, threads, shared_bytes);
  *clusters = blocks * Device().multiprocessors / cluster;
  return error;
}

cudaError_t check_launch(unsigned blocks, unsigned threads, unsigned cluster, size_t shared_bytes) {
  const Device device;
  if (!blocks || !threads || threads > 1024 || !cluster || cluster > 16 || blocks % cluster ||
      (cluster > 1 && (device.major < 9 || compiled_for() < 90))) {
    return result(cudaErrorInvalidConfiguration);
  }
  if (shared_bytes > (size_t)device.shared_per_block()) return result(cudaErrorInvalidValue);
  return cudaSuccess;
}

}  // namespace shim

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : shim::result(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return shim::result(cudaErrorInvalidDevice);
  const shim::Device d;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_per_block();
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared();
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads();
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrClusterLaunch:
      *value = d.major >= 9;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return shim::last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::last_error;
  shim::last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}
