#pragma once
// The shim's side of csrc/cuda/platform.cuh, which says what each of these does.
#include <cuda_runtime.h>

namespace mbk::cuda {

template <class T>
T* shared_memory() {
  return (T*)shim::shared_memory();
}

inline unsigned cluster_rank() { return shim::cluster_rank(); }
inline unsigned cluster_size() { return shim::cluster_size(); }
inline void cluster_arrive(SHIM_WHERE) { shim::cluster_arrive(where); }
inline void cluster_wait(SHIM_WHERE) { shim::cluster_wait(where); }
inline void cluster_sync(SHIM_WHERE) {
  shim::cluster_arrive(where);
  shim::cluster_wait(where);
}
template <class T>
T* cluster_map(T* shared, unsigned rank, SHIM_WHERE) {
  return (T*)shim::shared_memory_of(rank, shared, where);
}

template <class P>
cudaError_t launch(void (*kernel)(P), const P& params, unsigned blocks, unsigned threads,
                   unsigned cluster, size_t shared_bytes, cudaStream_t, SHIM_WHERE) {
  const cudaError_t error = shim::check_launch(blocks, threads, cluster, shared_bytes);
  if (error != cudaSuccess) return error;
  const auto run = [](const shim::Launch& l) { ((void (*)(P))l.kernel)(*(const P*)l.params); };
  shim::run({run, (void (*)())kernel, &params, blocks, threads, cluster, shared_bytes,
             __PRETTY_FUNCTION__, where});
  return cudaSuccess;
}

template <class P>
cudaError_t max_active_clusters(int* clusters, void (*)(P), unsigned threads, unsigned cluster,
                                size_t shared_bytes) {
  return shim::max_active_clusters(clusters, (int)threads, shared_bytes, (int)cluster);
}

}  // namespace mbk::cuda
