#pragma once
// Storage types at load and store: nothing else knows about 16-bit formats. Widening is exact;
// narrowing rounds once to nearest even in integer arithmetic or by F16C (AVX512-BF16's conversion
// flushes denormals, so it is not used). A NaN that is stored must be canonical: see canonical().
#include "core/args.h"
#include "core/kinds.h"

namespace mbk::MBK_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type a storage type is computed in.
template <class S>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class S>
inline constexpr DType kDTypeOf = __is_same(S, double) ? DType::f64
                                  : __is_same(S, bf16) ? DType::bf16
                                  : __is_same(S, f16)  ? DType::f16
                                                       : DType::f32;

// ---- one element
// ----------------------------------------------------------------------------------
MBK_FN float widen(float x) { return x; }
MBK_FN double widen(double x) { return x; }
MBK_FN float widen(bf16 x) { return as_float((int32_t)((uint32_t)x.bits << 16)); }
MBK_FN float widen(f16 x) {
  // Shift the exponent and mantissa into place, then rebias by one exact multiplication, which also
  // normalises denormals; the largest exponent stands for infinity and NaN.
  const uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13, sign = (uint32_t)(x.bits & 0x8000)
                                                                       << 16;
  const float scaled = as_float((int32_t)magnitude) * 0x1p112f;
  const bool special = (x.bits & 0x7c00) == 0x7c00;
  return as_float((int32_t)((special ? magnitude | 0x70000000u : bits(scaled)) | sign));
}

template <class S>
MBK_FN S narrow(Compute<S> x);
template <>
MBK_FN float narrow<float>(float x) {
  return x;
}
template <>
MBK_FN double narrow<double>(double x) {
  return x;
}
template <>
MBK_FN bf16 narrow<bf16>(float x) {
  const uint32_t u = bits(x);
  return {(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
MBK_FN f16 narrow<f16>(float x) {
  const uint32_t sign = bits(x) & 0x80000000u, magnitude = bits(x) & 0x7fffffffu;
  uint32_t h;
  if (magnitude >= 0x47800000u) {  // 2^16 and above, infinity, NaN
    h = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: denormal or zero
    // Adding 0.5 leaves the value in units of 2^-24 in the low mantissa bits, rounded to even.
    h = bits(as_float((int32_t)magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {(uint16_t)(h | (sign >> 16))};
}

// Rounding to odd keeps what a second rounding, to a 16-bit type, must know.
MBK_FN float round_to_odd(double x) {
  const float nearest = (float)x;
  const double back = nearest;
  if (back == x || x != x || bits(nearest) & 1) return nearest;
  const bool outward = (back < x) == (x > 0);
  return as_float((int32_t)(bits(nearest) + (outward ? 1 : -1)));
}
// x in the type that S is computed in, so that narrow<S>() rounds it once.
template <class S, class T>
MBK_FN Compute<S> computed_as(T x) {
  if constexpr (sizeof(S) == 2 && sizeof(T) == 8) return round_to_odd(x);
  return (Compute<S>)x;
}

#if defined(__AVX512BW__)
typedef int16_t i16v __attribute__((vector_size(64)));
MBK_FN __m512i odd_words() {  // k at 2 k + 1
  i16v index = i16v{};
  for (int k = 0; k < 16; ++k) index[2 * k + 1] = (int16_t)k;
  return (__m512i)index;
}
MBK_FN __m512i high_words() {  // 2 k + 1 at k
  i16v index = i16v{};
  for (int k = 0; k < 16; ++k) index[k] = (int16_t)(2 * k + 1);
  return (__m512i)index;
}
#endif

template <class V, class S>
MBK_FN V load(const S* p) {
  if constexpr (lanes<V> == 1) {
    return widen(*p);
#if MBK_SIMD
  } else if constexpr (sizeof(S) == sizeof(Element<V>)) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  } else {
    u16v h;
    memcpy(&h, p, sizeof h);
    if constexpr (__is_same(S, bf16)) {
#if defined(__AVX512BW__)
      // One permutation of words in place of widening and shifting: word k becomes word 2 k + 1.
      const __m512i words = _mm512_castsi256_si512((__m256i)h);
      return (V)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, odd_words(), words);
#else
      return as_float(__builtin_convertvector(h, i32v) << 16);
#endif
    } else {
#if defined(__AVX512F__)
      return (V)_mm512_cvtph_ps((__m256i)h);
#else
      return (V)_mm256_cvtph_ps((__m128i)h);
#endif
    }
#endif
  }
}

#if MBK_SIMD
// Whose high words are v rounded to bf16.
MBK_FN i32v rounded_words(f32v v) {
  const i32v u = as_int(v);
#if defined(__AVX512BW__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_set1_epi32(0x7fff), up = _mm512_set1_epi32(0x8000);
  return u + (i32v)_mm512_mask_blend_epi32(odd, half, up);
#else
  return u + 0x7fff + ((u >> 16) & 1);
#endif
}
template <class S>
MBK_FN u16v narrow_vector(f32v v) {
  if constexpr (__is_same(S, bf16)) {
#if defined(__AVX512BW__)
    const __m512i rounded = (__m512i)rounded_words(v);
    return (u16v)_mm512_castsi512_si256(_mm512_permutexvar_epi16(high_words(), rounded));
#else
    const __m256i high = _mm256_srli_epi32((__m256i)rounded_words(v), 16);
    return (u16v)_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#endif
  } else {
#if defined(__AVX512F__)
    return (u16v)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
  }
}
#endif

template <class S, class V>
MBK_FN void store(S* p, V v) {
  if constexpr (lanes<V> == 1) {
    *p = narrow<S>(v);
#if MBK_SIMD
  } else if constexpr (sizeof(S) == sizeof(Element<V>)) {
    memcpy(p, &v, sizeof v);
  } else {
    const u16v h = narrow_vector<S>(v);
    memcpy(p, &h, sizeof h);
#endif
  }
}

#if MBK_SIMD
// stream() of core/lane.h, into a 16-bit type: p is aligned to half a vector.
template <class S>
MBK_FN void stream(S* p, f32v v) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow_vector<S>(v));
#else
  _mm_stream_si128((__m128i*)p, (__m128i)narrow_vector<S>(v));
#endif
}
#endif

// Two vectors of elements at once, for those who do not ask which element is where: the words of
// bf16 then stay in their places, even ones in the first vector, odd ones in the second.
template <class V, class S>
MBK_FN void load_two(const S* p, V& first, V& second) {
  if constexpr (__is_same(S, bf16) && lanes<V> > 1) {
    Int<V> words;
    memcpy(&words, p, sizeof words);
    first = as_float(words << 16), second = as_float(words & -0x10000);
  } else {
    first = load<V>(p), second = load<V>(p + lanes<V>);
  }
}
#if MBK_SIMD
MBK_FN i32v two_of_bf16(f32v even, f32v odd) {
  const i32v low = rounded_words(even), high = rounded_words(odd);
#if defined(__AVX512BW__)
  const __m512i shifted = _mm512_srli_epi32((__m512i)low, 16);
  return (i32v)_mm512_mask_blend_epi16(0xaaaaaaaa, shifted, (__m512i)high);
#else
  return (i32v)_mm256_blend_epi16(_mm256_srli_epi32((__m256i)low, 16), (__m256i)high, 0xaa);
#endif
}
template <class S>
MBK_FN void store_two(S* p, f32v first, f32v second) {
  if constexpr (__is_same(S, bf16)) {
    const i32v words = two_of_bf16(first, second);
    memcpy(p, &words, sizeof words);
  } else {
    store(p, first), store(p + lanes<f32v>, second);
  }
}
template <class S>
MBK_FN void stream_two(S* p, f32v first, f32v second) {
  if constexpr (__is_same(S, bf16)) {
    stream((float*)p, as_float(two_of_bf16(first, second)));
  } else {
    stream(p, first), stream(p + lanes<f32v>, second);
  }
}
#endif

// A scalar argument: read where it lies.
MBK_FN double read(const Scalar& s) {
  if (!s.pointer) return s.value;
  switch (s.dtype) {
    case DType::f32:
      return *(const float*)s.pointer;
    case DType::bf16:
      return widen(*(const bf16*)s.pointer);
    case DType::f16:
      return widen(*(const f16*)s.pointer);
    default:
      return *(const double*)s.pointer;
  }
}

// Calls f with the array as one of its own type.
template <class F>
MBK_FN auto with_index(const void* p, IndexType type, F f) {
  switch (type) {
    case IndexType::i64:
      return f((const int64_t*)p);
    case IndexType::i32:
      return f((const int32_t*)p);
    case IndexType::i16:
      return f((const int16_t*)p);
    case IndexType::i8:
      return f((const int8_t*)p);
    default:
      return f((const uint8_t*)p);
  }
}
MBK_FN int64_t read_index(const void* p, IndexType type, int64_t offset) {
  return with_index(p, type, [offset](auto* values) { return (int64_t)values[offset]; });
}

}  // namespace mbk::MBK_ISA
