#pragma once
// Numbers that look random and depend on nothing but a key and a counter, for every lane type.
#include "core/lane.h"

namespace mbk::MBK_ISA {

template <class V>
struct UnsignedOf {
  typedef uint32_t type;
};
#if MBK_SIMD
typedef uint32_t u32v __attribute__((vector_size(kBytes)));
template <>
struct UnsignedOf<f32v> {
  typedef u32v type;
};
#endif
// 32 bits a lane of V, a vector of floats.
template <class V>
using Unsigned = typename UnsignedOf<V>::type;

// A permutation of 32 bits in which every bit of x moves every other one (found by search: Wellons,
// "Prospecting for hash functions", 2018; bias 0.11).
template <class U>
MBK_FN U mixed(U x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

// For a key, 32 bits for each counter. Keys that are small numbers are as far apart as any.
struct RandomBits {
  uint32_t low, high;

  MBK_FN explicit RandomBits(uint64_t key)
      : low(mixed((uint32_t)key + 0x9e3779b9u)), high(mixed((uint32_t)(key >> 32) ^ low)) {}
  // Of the counters first, first + 1, ...; `first` is a multiple of the lane count.
  template <class V>
  MBK_FN Unsigned<V> at(int64_t first) const {
    Unsigned<V> counter = Unsigned<V>{} + (uint32_t)first;
    if constexpr (lanes<V> > 1)
      for (int k = 0; k < lanes<V>; ++k) counter[k] += (uint32_t)k;
    return mixed(mixed(counter ^ low) + (high + (uint32_t)(first >> 32) * 0x9e3779b9u));
  }
};

}  // namespace mbk::MBK_ISA
