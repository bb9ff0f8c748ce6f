#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace mbk::cuda {
namespace {

__device__ TargetErrors target_errors;

Device ask(int number) {
  Device d{};
  d.number = number;
  const auto attribute = [number](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, number), "asking for a device's properties");
    return value;
  };
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  d.capability = std::min(code_capability(), 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                                                 attribute(cudaDevAttrComputeCapabilityMinor));
  // In code for older devices every block takes itself for the first of its cluster.
  d.has_clusters = d.capability >= 90 && attribute(cudaDevAttrClusterLaunch);
  d.shared_bytes = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  void* errors = nullptr;
  check(cudaGetSymbolAddress(&errors, target_errors), "loading the kernels");
  d.errors = static_cast<TargetErrors*>(errors);
  return d;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not at somebody's next call
  throw std::runtime_error("mbkern: " + std::string(what) + ": " + cudaGetErrorString(error));
}

const Device& current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int number = 0;
  check(cudaGetDevice(&number), "asking for the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(number);
  return found != known.end() ? found->second : known.emplace(number, ask(number)).first->second;
}

void use_device(int number) {
  int current = 0;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current != number) check(cudaSetDevice(number), "choosing a device");
}

TargetErrors take_target_errors() {
  TargetErrors found{};
  const TargetErrors none{};
  TargetErrors* const errors = current_device().errors;
  check(cudaDeviceSynchronize(), "waiting for the device");
  check(cudaMemcpy(&found, errors, sizeof found, cudaMemcpyDeviceToHost), "reading its errors");
  check(cudaMemcpy(errors, &none, sizeof none, cudaMemcpyHostToDevice), "clearing its errors");
  return found;
}

}  // namespace mbk::cuda
