#pragma once
// What kernels need besides CUDA C++: launches, dynamic shared memory, thread-block clusters. The
// only file here that knows that kernels are also compiled for the CPU (tests/shim), where all of
// this has a counterpart with the same names.
#include <cuda_runtime.h>
#if defined(MBKERN_CUDA_SHIM)
#include <shim_platform.h>
#else

namespace mbk::cuda {

// The block's dynamic shared memory, as many bytes as the launch asked for. Its contents are
// undefined.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char mbkern_shared_memory[];
  return reinterpret_cast<T*>(mbkern_shared_memory);
}

// Thread-block clusters: blocks that run together and reach each other's shared memory. All threads
// of all blocks of a cluster take part in its barrier: each arrives (what it wrote before can then
// be seen), does what does not depend on others, and waits. A block must not end while another may
// still reach into it, nor reach into one that may not have begun: both ends of a kernel need a
// barrier. Before sm_90 every block is a cluster of its own.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
#endif
}
// Unlike the two halves, also a barrier of the block where there are no clusters.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cluster_arrive();
  cluster_wait();
#else
  __syncthreads();
#endif
}
// The same place in the shared memory of the cluster's block `rank`.
template <class T>
__device__ __forceinline__ T* cluster_map(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return mapped;
#else
  return shared;
#endif
}

// The configuration of a launch, and the room that its attribute needs.
template <class P>
class Configuration {
 public:
  // Asks for more than 48 KB of shared memory, or more than 8 blocks a cluster, where needed.
  Configuration(void (*kernel)(P), unsigned blocks, unsigned threads, unsigned cluster,
                size_t shared_bytes, cudaStream_t stream) {
    config_.gridDim = blocks;
    config_.blockDim = threads;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = cluster > 1;
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {cluster, 1, 1};
    if (shared_bytes > 48 * 1024) {
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared_bytes);
    }
    if (error_ == cudaSuccess && cluster > 8) {
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }
  cudaError_t error() const { return error_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
  cudaError_t error_ = cudaSuccess;
};

// kernel<<<blocks, threads, shared_bytes, stream>>>(params) in clusters of `cluster` blocks.
template <class P>
cudaError_t launch(void (*kernel)(P), const P& params, unsigned blocks, unsigned threads,
                   unsigned cluster, size_t shared_bytes, cudaStream_t stream) {
  const Configuration<P> config(kernel, blocks, threads, cluster, shared_bytes, stream);
  return config.error() != cudaSuccess ? config.error()
                                       : cudaLaunchKernelEx(config.get(), kernel, params);
}

// How many such clusters the device holds at once.
template <class P>
cudaError_t max_active_clusters(int* clusters, void (*kernel)(P), unsigned threads,
                                unsigned cluster, size_t shared_bytes) {
  const Configuration<P> config(kernel, cluster, threads, cluster, shared_bytes, nullptr);
  return config.error() != cudaSuccess
             ? config.error()
             : cudaOccupancyMaxActiveClusters(clusters, kernel, config.get());
}

}  // namespace mbk::cuda

#endif
