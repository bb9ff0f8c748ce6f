#pragma once
// The shim's side of csrc/cuda/platform.cuh, which says what each of these does.
#include <cuda_runtime.h>

#include "copies.h"

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

class Barrier {
 public:
  void init(unsigned arrivals, SHIM_WHERE) { shim::barrier_init(this, arrivals, where); }
  void arrive(SHIM_WHERE) { shim::barrier_arrive(this, 0, where); }
  void arrive_expect(unsigned bytes, SHIM_WHERE) { shim::barrier_arrive(this, bytes, where); }
  void wait(unsigned parity, SHIM_WHERE) { shim::barrier_wait(this, parity, where); }

 private:
  [[maybe_unused]] uint64_t word_;
};
inline void bulk_load(void* to, const void* from, unsigned bytes, Barrier* barrier, SHIM_WHERE) {
  shim::bulk_load(to, from, bytes, barrier, where);
}
inline void bulk_store(void* to, const void* from, unsigned bytes, SHIM_WHERE) {
  shim::bulk_store(to, from, bytes, where);
}
inline void bulk_commit() { shim::bulk_commit(); }
template <int kGroupsLeft>
void bulk_wait() {
  shim::bulk_wait(kGroupsLeft);
}
inline void fence_async() { shim::fence_async(); }
inline void async_load(void* to, const void* from, SHIM_WHERE) {
  shim::async_load(to, from, where);
}
inline void async_commit() { shim::async_commit(); }
template <int kGroupsLeft>
void async_wait() {
  shim::async_wait(kGroupsLeft);
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
cudaError_t compiled_for(int* capability, void (*)(P)) {
  *capability = shim::compiled_for();
  return cudaSuccess;
}

template <class P>
cudaError_t max_active_clusters(int* clusters, void (*)(P), unsigned threads, unsigned cluster,
                                size_t shared_bytes) {
  return shim::max_active_clusters(clusters, (int)threads, shared_bytes, (int)cluster);
}

}  // namespace mbk::cuda
