#pragma once
// Neighbouring elements of a storage type in one access of 16 bytes (8 for 16-bit types), and in
// the registers that the access fills: a value is unpacked where it is used, so that nothing waits
// for the load before.
#include "core/dtype.h"
#include "cuda/platform.cuh"

namespace mbk::MBK_ISA {

// Calls f with a null pointer of a storage type; fp64 is out of the question for what a call reads
// that computes in fp32.
template <bool kDouble, class F>
MBK_FN void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    default:
      if constexpr (kDouble) {
        if (dtype == DType::f64) return f((double*)nullptr);
      }
      return f((f16*)nullptr);
  }
}

// A canonical number as the type that S is computed in: a GPU's conversion makes a NaN of its own.
template <class S, class T>
MBK_FN Compute<S> converted(T x) {
  if constexpr (sizeof(T) != sizeof(Compute<S>)) return canonical(computed_as<S>(x));
  return (Compute<S>)x;
}

// widen(x), in one instruction where the GPU has one.
template <class S>
MBK_FN Compute<S> widened(S x) {
#if defined(__CUDA_ARCH__)
  if constexpr (__is_same(S, f16)) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
  }
#endif
  return widen(x);
}

// Elements that a thread has next to one another: 16 bytes of the type computed in.
template <class T>
inline constexpr int kRun = 16 / sizeof(T);

template <class S>
struct alignas(16) Packed {
  S element[kRun<S>];
  MBK_FN S get(int k) const { return element[k]; }
  MBK_FN void set(int k, S x) { element[k] = x; }
};

template <class S>
struct alignas(8) PackedHalves {
  uint32_t word[2];
  MBK_FN float get(int k) const { return widened(S{(uint16_t)(word[k / 2] >> (k % 2 * 16))}); }
  MBK_FN void set(int k, S x) {
    word[k / 2] = (word[k / 2] & (k % 2 ? 0xffffu : 0xffff0000u)) | (uint32_t)x.bits << k % 2 * 16;
  }
};
template <>
struct Packed<bf16> : PackedHalves<bf16> {};
template <>
struct Packed<f16> : PackedHalves<f16> {};

template <class S>
MBK_FN uint32_t pack_pair(float low, float high) {
  uint32_t word = 0;
#if defined(__CUDA_ARCH__)
  if constexpr (__is_same(S, bf16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
  (void)low, (void)high;
  return word;
}
// Rounded once to nearest even. A NaN may become another NaN than ours.
template <class S>
MBK_FN Packed<S> pack(const Compute<S> (&x)[kRun<Compute<S>>]) {
  Packed<S> packed{};
#if defined(__CUDA_ARCH__)
  constexpr bool kInPairs = sizeof(S) == 2;
#else
  constexpr bool kInPairs = false;
#endif
  if constexpr (kInPairs) {
    for (int k = 0; k < 2; ++k) packed.word[k] = pack_pair<S>(x[2 * k], x[2 * k + 1]);
  } else {
    for (int k = 0; k < kRun<Compute<S>>; ++k) packed.set(k, narrow<S>(x[k]));
  }
  return packed;
}

}  // namespace mbk::MBK_ISA
