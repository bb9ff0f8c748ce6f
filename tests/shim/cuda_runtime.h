#pragma once
// Stands in for CUDA's header of this name where kernels are compiled as plain C++ for the CPU: the
// words of CUDA C++ and the host functions that csrc/cuda uses, nothing else. Whatever is missing
// here is missing on purpose: float atomics, approximate intrinsics, static shared memory.
#include "fibres.h"
#include "host_api.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::shim::thread_index())
#define blockIdx (::shim::block_index())
#define blockDim (::shim::block_size())
#define gridDim (::shim::grid_size())
inline constexpr int warpSize = 32;

// ---- Barriers and warps ----------------------------------------------------------------------

inline void __syncthreads(SHIM_WHERE) { shim::block_barrier("__syncthreads", false, where); }
inline int __syncthreads_or(int predicate, SHIM_WHERE) {
  return shim::block_barrier("__syncthreads_or", predicate != 0, where);
}
inline int __syncthreads_and(int predicate, SHIM_WHERE) {
  return !shim::block_barrier("__syncthreads_and", predicate == 0, where);
}
inline void __syncwarp(unsigned mask = 0xffffffff, SHIM_WHERE) {
  shim::warp_barrier("__syncwarp", mask, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_WHERE) {
  return shim::warp_ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, SHIM_WHERE) {
  return shim::warp_ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_WHERE) {
  return shim::warp_ballot("__all_sync", mask, predicate == 0, where) == 0;
}

namespace shim {
template <class T>
T exchange(const char* name, unsigned mask, T value, unsigned source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a type that __shfl takes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = warp_exchange(name, mask, bits, source, where);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace shim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_WHERE) {
  const unsigned lane = threadIdx.x % 32, first = lane & -(unsigned)width;
  return shim::exchange("__shfl_sync", mask, value, first + ((unsigned)source & (width - 1)),
                        where);
}
// A lane of another group of `width` gives the caller's own value back.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SHIM_WHERE) {
  const unsigned lane = threadIdx.x % 32, other = lane ^ (unsigned)bits;
  const bool inside = other < (lane & -(unsigned)width) + width;  // CUDA's rule: lower groups too
  return shim::exchange("__shfl_xor_sync", mask, value, inside ? other : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_WHERE) {
  const unsigned lane = threadIdx.x % 32, other = lane + delta;
  const bool inside = other < (lane & -(unsigned)width) + width;
  return shim::exchange("__shfl_down_sync", mask, value, inside ? other : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_WHERE) {
  const unsigned lane = threadIdx.x % 32;
  const bool inside = lane % width >= delta;
  return shim::exchange("__shfl_up_sync", mask, value, inside ? lane - delta : lane, where);
}

// ---- Memory ----------------------------------------------------------------------------------

namespace shim {
template <class T>
struct Integer {  // what atomics take
  static_assert(T(-1) == T(-1) && T(1) / T(2) == 0, "no float atomics: sums would have an order");
  typedef T type;
};
template <class T>
using Same = typename Integer<T>::type;
// Relaxed, as CUDA's are. Two steps do: nobody comes in between.
template <class T, class Change>
T atomic(T* address, Change change) {
  order_atomic(address);
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, change(old), __ATOMIC_RELAXED);
  return old;
}
}  // namespace shim

template <class T>
T atomicAdd(T* address, shim::Same<T> value) {
  return shim::atomic(address, [=](T old) { return (T)(old + value); });
}
template <class T>
T atomicExch(T* address, shim::Same<T> value) {
  return shim::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicMax(T* address, shim::Same<T> value) {
  return shim::atomic(address, [=](T old) { return old > value ? old : value; });
}
template <class T>
T atomicMin(T* address, shim::Same<T> value) {
  return shim::atomic(address, [=](T old) { return old < value ? old : value; });
}
template <class T>
T atomicOr(T* address, shim::Same<T> value) {
  return shim::atomic(address, [=](T old) { return old | value; });
}
template <class T>
T atomicCAS(T* address, shim::Same<T> expected, shim::Same<T> value) {
  return shim::atomic(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return shim::atomic(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline void __threadfence() { shim::order_fence(); }  // the threads are one of the CPU's
inline void __threadfence_block() { __threadfence(); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, shim::Plain<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, shim::Plain<T> value) {
  *address = value;
}

// ---- Numbers ---------------------------------------------------------------------------------

inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }

namespace shim {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace shim
inline int __float_as_int(float x) { return shim::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return shim::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return shim::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return shim::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return shim::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return shim::bit_cast<double>(x); }
