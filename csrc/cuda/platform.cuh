#pragma once
// What kernels need besides CUDA C++: launches, dynamic shared memory, thread-block clusters,
// asynchronous copies. The only file here that knows that kernels are also compiled for the CPU
// (tests/shim), where all of this has a counterpart with the same names.
#include <cuda_runtime.h>
#include <stdint.h>

#include <map>
#include <mutex>
#include <utility>
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

// Copies from global to shared memory that run while the thread goes on, in groups of each thread:
// async_wait<n>() waits for all but the latest n. Then the thread sees what it has loaded; others
// do behind a barrier of the block. 16 bytes, both ends aligned to 16.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void async_load(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroupsLeft) : "memory");
}

// The bulk copy engine, from sm_90 on; on older devices none of these may be reached. One thread
// moves any multiple of 16 bytes, both ends aligned to 16.
//
// A Barrier lies in shared memory, aligned to 8. One thread initialises it, and no other touches it
// before a barrier of the block. Its phases are numbered from 0; a phase is over when `arrivals`
// threads have arrived and all bytes that they expect have been loaded. wait(phase % 2) returns
// when it is, and the thread sees the data.
#if __CUDA_ARCH__ >= 900
#define MBK_SM90_ASM(...) asm volatile(__VA_ARGS__)
#else
#define MBK_SM90_ASM(...) __trap()
#endif
class Barrier {
 public:
  __device__ __forceinline__ void init(unsigned arrivals) {
    MBK_SM90_ASM(
        "mbarrier.init.shared::cta.b64 [%0], %1;\n\t"
        "fence.mbarrier_init.release.cluster;\n\t"
        "fence.proxy.async.shared::cta;" : : "r"(shared_address(this)),
        "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    MBK_SM90_ASM(
        "mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(this)) : "memory");
  }
  __device__ __forceinline__ void arrive_expect(unsigned bytes) {
    MBK_SM90_ASM(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(shared_address(this)),
        "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void wait(unsigned parity) {
    unsigned over = 1;
    do {
      MBK_SM90_ASM(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}" : "=r"(over) : "r"(shared_address(this)),
          "r"(parity) : "memory");
    } while (!over);
  }

 private:
  uint64_t word_;
};
// The bytes are among those that somebody expects at the barrier's current phase.
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes,
                                          Barrier* barrier) {
  MBK_SM90_ASM(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
        "r"(shared_address(barrier))
      : "memory");
}
// Whoever has written what a bulk_store reads calls fence_async() and then a barrier with the
// thread that stores; so does that thread.
__device__ __forceinline__ void fence_async() {
  MBK_SM90_ASM("fence.proxy.async.shared::cta;" : : : "memory");
}
// Stores go in groups of their thread. bulk_wait<n>() returns when all but the latest n have read
// their sources, which may then be overwritten; the data can be read when the kernel is over. A
// thread waits for all of its groups before it ends.
__device__ __forceinline__ void bulk_store(void* to, const void* from, unsigned bytes) {
  MBK_SM90_ASM("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" : : "l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  MBK_SM90_ASM("cp.async.bulk.commit_group;" : : : "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void bulk_wait() {
  MBK_SM90_ASM("cp.async.bulk.wait_group.read %0;" : : "n"(kGroupsLeft) : "memory");
}
#undef MBK_SM90_ASM

// Lets a kernel have more than 48 KB of shared memory on the current device. The limit is a
// property of the kernel there, not of a launch, so it is raised only: other threads may be about
// to launch with more, and so may a graph that was captured.
template <class P>
cudaError_t allow_shared_memory(void (*kernel)(P), size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, void (*)(P)>, size_t> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
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
    if (shared_bytes > 48 * 1024) error_ = allow_shared_memory(kernel, shared_bytes);
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

// The compute capability that a kernel was compiled for, 90 for sm_90: older than the device's
// where the driver has compiled PTX. What is behind an #if of __CUDA_ARCH__ follows this one.
template <class P>
cudaError_t compiled_for(int* capability, void (*kernel)(P)) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *capability = attributes.ptxVersion;
  return error;
}

// How many such clusters the device holds at once. Of single blocks the occupancy calculator is
// asked: without clusters in its configuration the other query answers 1.
template <class P>
cudaError_t max_active_clusters(int* clusters, void (*kernel)(P), unsigned threads,
                                unsigned cluster, size_t shared_bytes) {
  const Configuration<P> config(kernel, cluster, threads, cluster, shared_bytes, nullptr);
  if (config.error() != cudaSuccess) return config.error();
  if (cluster > 1) return cudaOccupancyMaxActiveClusters(clusters, kernel, config.get());
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, (int)threads, shared_bytes);
  *clusters = blocks * multiprocessors;
  return error;
}

}  // namespace mbk::cuda

#endif
