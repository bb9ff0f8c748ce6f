#pragma once
// Facts about the current device, and errors of CUDA as exceptions. Host code.
#include <cuda_runtime.h>

#include "cuda/calls.h"

namespace mbk::cuda {

// Throws std::runtime_error, with CUDA's own words, unless all went well.
void check(cudaError_t error, const char* what);

struct Device {
  int number, multiprocessors, capability;  // 90: sm_90
  size_t shared_bytes;                      // that a block can have
  TargetErrors* errors;
  bool has_clusters() const { return capability >= 90; }
};
// Asked once a device.
const Device& current_device();

inline cudaStream_t stream_of(const Queue& queue) {
  return static_cast<cudaStream_t>(queue.stream);
}

}  // namespace mbk::cuda
