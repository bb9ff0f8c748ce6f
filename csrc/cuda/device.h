#pragma once
// Facts about the current device, and errors of CUDA as exceptions. Host code.
#include <cuda_runtime.h>

#include "cuda/calls.h"

namespace mbk::cuda {

// Throws std::runtime_error, with CUDA's own words, unless all went well.
void check(cudaError_t error, const char* what);

struct Device {
  int number, multiprocessors;
  int capability;       // 90: sm_90; that of the kernels, where these are older than the device
  bool has_clusters;    // the device, and the kernels know of them
  size_t shared_bytes;  // that a block can have
  TargetErrors* errors;
};
// Asked once a device.
const Device& current_device();

// What the kernels that run on the current device were compiled for, 90: sm_90.
int code_capability();

inline cudaStream_t stream_of(const Queue& queue) {
  return static_cast<cudaStream_t>(queue.stream);
}

}  // namespace mbk::cuda
