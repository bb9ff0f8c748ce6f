#pragma once
// The lane type: what one instruction set computes at once, and the few operations that need its
// name.
//
// Everything above this file is written for "V", which is float or double (the scalar tier and
// CUDA) or the vectors f32v and f64v of the ISA being compiled. + - * / < ?: and integer shifts
// come from the compiler's vector extensions; what those lack (fma, square root, partial access),
// or compile to more than one instruction, is named here. No function may be contracted, reordered
// or approximated: see docs/numerics.md.
//
// One definition rule: the build compiles these headers once per ISA with MBK_ISA defined, so every
// symbol lives in namespace mbk::MBK_ISA and every function is inlined. No STL here: a weak
// template instance compiled with AVX-512 could be the copy that the linker keeps for everybody.
#include <stdint.h>
#include <string.h>

// Code that is compiled once, with the baseline's instructions, is the tier "host".
#if !defined(MBK_ISA)
#define MBK_ISA host
#endif

// Code that launches loops; always inlined for the same reason as these, but never on a device.
#define MBK_HOST_FN inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define MBK_FN __host__ __device__ __forceinline__
#else
#define MBK_FN inline __attribute__((always_inline))
#endif

// A pass over a row: long enough to be called, and kept out of line so that it exists once.
#define MBK_PASS __attribute__((noinline))
// A pass that hardly any row needs: short rather than fast.
#define MBK_RARE __attribute__((noinline, cold))

#if !defined(__CUDACC__) && (defined(__AVX512F__) || defined(__AVX2__))
#define MBK_SIMD 1
#include <immintrin.h>
#endif

namespace mbk::MBK_ISA {

// ---- one lane ---------------------------------------------------------------------------------

MBK_FN uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
MBK_FN uint64_t bits(double x) {
  uint64_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
MBK_FN int32_t as_int(float x) { return (int32_t)bits(x); }
MBK_FN int64_t as_int(double x) { return (int64_t)bits(x); }
MBK_FN float as_float(int32_t i) {
  float x;
  memcpy(&x, &i, sizeof x);
  return x;
}
MBK_FN double as_float(int64_t i) {
  double x;
  memcpy(&x, &i, sizeof x);
  return x;
}

// a * b + c, rounded once.
MBK_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  // No fused multiply-add in the x86-64 baseline. The product of two floats is exact in double; the
  // sum is rounded to odd (Boldo & Melquiond 2008), after which rounding to float rounds only once.
  // That matters only where s looks like a float or halfway between two: its last 28 bits are 0.
  const double p = (double)a * (double)b, z = c;
  double s = p + z;
  if (!(bits(s) & 0xfffffff)) {
    const double v = s - p;
    const double error = (p - (s - v)) + (z - v);  // exact (Knuth); NaN where s is not finite
    if (error > 0 || error < 0) {
      const bool away = (error > 0) == (s > 0);
      s = as_float((int64_t)(bits(s) + (away ? 1 : -1)));
    }
  }
  return (float)s;
#endif
}
MBK_FN float sqrt(float x) { return __builtin_sqrtf(x); }
MBK_FN double sqrt(double x) { return __builtin_sqrt(x); }
MBK_FN float abs(float x) { return as_float((int32_t)(bits(x) & 0x7fffffffu)); }
MBK_FN double abs(double x) { return as_float((int64_t)(bits(x) & 0x7fffffffffffffffull)); }
template <class T>
MBK_FN T select(bool m, T a, T b) {
  return m ? a : b;
}
MBK_FN bool any(bool m) { return m; }
// Whether one of some vectors of numbers >= 0 has one that is neither 0 nor in [first, last].
template <int n>
MBK_FN bool any_outside(const int32_t (&x)[n], int32_t first, int32_t last) {
  bool outside = false;
  for (const int32_t v : x) outside |= (uint32_t)(v - first) > (uint32_t)(last - first) && v != 0;
  return outside;
}

#if MBK_SIMD

// ---- many lanes -------------------------------------------------------------------------------
#if defined(__AVX512F__)
inline constexpr int kBytes = 64;
#else
inline constexpr int kBytes = 32;
#endif
typedef float f32v __attribute__((vector_size(kBytes)));
typedef int32_t i32v __attribute__((vector_size(kBytes)));
typedef double f64v __attribute__((vector_size(kBytes)));
typedef int64_t i64v __attribute__((vector_size(kBytes)));
typedef uint16_t u16v __attribute__((vector_size(kBytes / 2)));

MBK_FN i32v as_int(f32v x) { return (i32v)x; }
MBK_FN i64v as_int(f64v x) { return (i64v)x; }
MBK_FN f32v as_float(i32v x) { return (f32v)x; }
MBK_FN f64v as_float(i64v x) { return (f64v)x; }
MBK_FN f32v abs(f32v x) { return (f32v)((i32v)x & 0x7fffffff); }
MBK_FN f64v abs(f64v x) { return (f64v)((i64v)x & 0x7fffffffffffffff); }
MBK_FN f32v select(i32v m, f32v a, f32v b) { return m ? a : b; }
MBK_FN i32v select(i32v m, i32v a, i32v b) { return m ? a : b; }
MBK_FN f64v select(i64v m, f64v a, f64v b) { return m ? a : b; }
MBK_FN i64v select(i64v m, i64v a, i64v b) { return m ? a : b; }

// Writes past the caches: what would be overwritten is not read, and nothing else is evicted. p is
// aligned to a vector; fence() comes before others may read.
MBK_FN void fence() { _mm_sfence(); }
#if defined(__AVX512F__)
MBK_FN void stream(float* p, f32v x) { _mm512_stream_ps(p, (__m512)x); }
MBK_FN void stream(double* p, f64v x) { _mm512_stream_pd(p, (__m512d)x); }
MBK_FN f32v fma(f32v a, f32v b, f32v c) {
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
MBK_FN f32v sqrt(f32v x) { return (f32v)_mm512_sqrt_ps((__m512)x); }
MBK_FN f64v sqrt(f64v x) { return (f64v)_mm512_sqrt_pd((__m512d)x); }
MBK_FN bool any(i32v m) { return _mm512_movepi32_mask((__m512i)m) != 0; }
// With 1 subtracted, 0 is -1: small as a signed number, the largest as an unsigned one.
template <int n>
MBK_FN bool any_outside(const i32v (&x)[n], int32_t first, int32_t last) {
  const __m512i one = _mm512_set1_epi32(1);
  __m512i least = _mm512_sub_epi32((__m512i)x[0], one), most = least;
  for (int k = 1; k < n; ++k) {
    const __m512i v = _mm512_sub_epi32((__m512i)x[k], one);
    least = _mm512_min_epu32(least, v), most = _mm512_max_epi32(most, v);
  }
  return _mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(first - 1)) |
         _mm512_cmpge_epi32_mask(most, _mm512_set1_epi32(last));
}
MBK_FN bool any(i64v m) { return _mm512_movepi64_mask((__m512i)m) != 0; }
#else
MBK_FN void stream(float* p, f32v x) { _mm256_stream_ps(p, (__m256)x); }
MBK_FN void stream(double* p, f64v x) { _mm256_stream_pd(p, (__m256d)x); }
MBK_FN f32v fma(f32v a, f32v b, f32v c) {
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
MBK_FN f32v sqrt(f32v x) { return (f32v)_mm256_sqrt_ps((__m256)x); }
MBK_FN f64v sqrt(f64v x) { return (f64v)_mm256_sqrt_pd((__m256d)x); }
MBK_FN bool any(i32v m) { return _mm256_movemask_ps((__m256)m) != 0; }
// With 1 subtracted, 0 is -1: small as a signed number, the largest as an unsigned one.
template <int n>
MBK_FN bool any_outside(const i32v (&x)[n], int32_t first, int32_t last) {
  const __m256i one = _mm256_set1_epi32(1), lowest = _mm256_set1_epi32(first - 1);
  __m256i least = _mm256_sub_epi32((__m256i)x[0], one), most = least;
  for (int k = 1; k < n; ++k) {
    const __m256i v = _mm256_sub_epi32((__m256i)x[k], one);
    least = _mm256_min_epu32(least, v), most = _mm256_max_epi32(most, v);
  }
  const __m256i high = _mm256_cmpgt_epi32(most, _mm256_set1_epi32(last - 1));
  const __m256i low = _mm256_xor_si256(_mm256_min_epu32(least, lowest), lowest);
  return !_mm256_testz_si256(_mm256_or_si256(high, low), _mm256_or_si256(high, low));
}
MBK_FN bool any(i64v m) { return _mm256_movemask_pd((__m256d)m) != 0; }
#endif

#else  // one lane is all there is

MBK_FN void fence() {}
MBK_FN void stream(float* p, float x) { *p = x; }
MBK_FN void stream(double* p, double x) { *p = x; }

typedef float f32v;
typedef int32_t i32v;
typedef double f64v;
typedef int64_t i64v;

#endif

// ---- what the lane types have in common
// ----------------------------------------------------------

template <class V>
struct LaneOf;  // element type, integer type of the same shape, lane count
template <>
struct LaneOf<float> {
  typedef float Element;
  typedef int32_t Int;
  static constexpr int count = 1;
};
template <>
struct LaneOf<double> {
  typedef double Element;
  typedef int64_t Int;
  static constexpr int count = 1;
};
#if MBK_SIMD
template <>
struct LaneOf<f32v> {
  typedef float Element;
  typedef i32v Int;
  static constexpr int count = kBytes / 4;
};
template <>
struct LaneOf<f64v> {
  typedef double Element;
  typedef i64v Int;
  static constexpr int count = kBytes / 8;
};
#endif
template <class V>
using Element = typename LaneOf<V>::Element;
template <class V>
using Int = typename LaneOf<V>::Int;
template <class V>
inline constexpr int lanes = LaneOf<V>::count;

template <bool kFirst, class A, class B>
struct Pick {
  typedef A type;
};
template <class A, class B>
struct Pick<false, A, B> {
  typedef B type;
};

// The widest vector of an element type: Vector<float> is f32v, Vector<double> is f64v.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef f32v type;
};
template <>
struct VectorOf<double> {
  typedef f64v type;
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class V>
MBK_FN V splat(Element<V> x) {
  if constexpr (lanes<V> == 1) {
    return x;
  } else {
    return x - V{};  // x + 0 would turn -0 into +0
  }
}
// first, first + 1, ... as numbers.
template <class V>
MBK_FN V lane_numbers(int first) {
  Element<V> number[lanes<V>];
  for (int k = 0; k < lanes<V>; ++k) number[k] = (Element<V>)(first + k);
  V v;
  memcpy(&v, number, sizeof v);
  return v;
}
inline constexpr int64_t kMostCachedBytes = 1 << 25;  // what is as large, no cache keeps
// Whether vectors of a gradient are streamed: it is so large that no cache would keep it, not over
// its input, and each of its rows, `row_bytes` apart, begins with a whole vector. (Rows of
// cross-entropy are not streamed: the target's column is corrected afterwards, which then waits for
// memory.)
template <class V>
MBK_FN bool streams_past_caches(const void* grad, const void* input, int64_t bytes,
                                int64_t row_bytes) {
  return grad && grad != input && bytes >= kMostCachedBytes && (uintptr_t)grad % sizeof(V) == 0 &&
         row_bytes % (int64_t)sizeof(V) == 0;
}
// a < b ? a : b and a > b ? a : b, lane by lane; where either is NaN the result is b.
template <class V>
MBK_FN V min(V a, V b) {
  return select(a < b, a, b);
}
template <class V>
MBK_FN V max(V a, V b) {
  return select(a > b, a, b);
}
// Whether the lanes have scale(p, n): p 2^n for a whole n, rounded once; a NaN stays one.
template <class V>
inline constexpr bool kScales = false;

// What x86 has one instruction for.
#if MBK_SIMD && defined(__AVX512F__)
MBK_FN f32v min(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
MBK_FN f64v min(f64v a, f64v b) { return (f64v)_mm512_min_pd((__m512d)a, (__m512d)b); }
MBK_FN f32v max(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
MBK_FN f64v max(f64v a, f64v b) { return (f64v)_mm512_max_pd((__m512d)a, (__m512d)b); }
template <>
inline constexpr bool kScales<f32v> = true;
MBK_FN f32v scale(f32v p, f32v n) { return (f32v)_mm512_scalef_ps((__m512)p, (__m512)n); }
#elif MBK_SIMD
MBK_FN f32v min(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
MBK_FN f64v min(f64v a, f64v b) { return (f64v)_mm256_min_pd((__m256d)a, (__m256d)b); }
MBK_FN f32v max(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
MBK_FN f64v max(f64v a, f64v b) { return (f64v)_mm256_max_pd((__m256d)a, (__m256d)b); }
#endif
// a * b + c where one rounding or two make no difference that is promised: fused in fp32; in fp64
// two roundings, because the x86-64 baseline has no fused operation and emulating it would be slow.
template <class V>
MBK_FN V multiply_add(V a, V b, V c) {
  if constexpr (sizeof(Element<V>) == 4) {
    return fma(a, b, c);
  } else {
    return a * b + c;
  }
}
template <class V>
MBK_FN Element<V> get(V v, int lane) {
  if constexpr (lanes<V> == 1) {
    (void)lane;
    return v;
  } else {
    return v[lane];
  }
}

// All lanes joined by halves: lane k takes lane k + half.
template <class V, class Join>
MBK_FN Element<V> join_lanes(V v, Join join) {
  if constexpr (lanes<V> == 1) {
    (void)join;
    return v;
#if MBK_SIMD
  } else if constexpr (sizeof(Element<V>) == 4) {
#if defined(__AVX512F__)
    const __m256 eight =
        join(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    const __m256 eight = (__m256)v;
#endif
    __m128 four = join(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = join(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(join(four, _mm_shuffle_ps(four, four, 1)));
  } else {
#if defined(__AVX512F__)
    const __m256d four =
        join(_mm512_castpd512_pd256((__m512d)v), _mm512_extractf64x4_pd((__m512d)v, 1));
#else
    const __m256d four = (__m256d)v;
#endif
    const __m128d two = join(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(join(two, _mm_unpackhi_pd(two, two)));
#endif
  }
}
// Vectors joined by halves: vector k takes vector k + half. Not in a loop over halves, which would
// keep the vectors in memory.
template <class V, int kCount, class Join>
MBK_FN V join_vectors(const V (&v)[kCount], Join join) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    V half[kCount / 2];
    for (int k = 0; k < kCount / 2; ++k) half[k] = join(v[k], v[k + kCount / 2]);
    return join_vectors(half, join);
  }
}
// The sum of all lanes, of one vector or of several; part of the canonical order of row sums.
template <class V>
MBK_FN Element<V> sum_lanes(V v) {
  return join_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
template <class V, int kCount>
MBK_FN V sum_vectors(const V (&v)[kCount]) {
  return join_vectors(v, [](V a, V b) __attribute__((always_inline)) { return a + b; });
}
template <class V, int kCount>
MBK_FN Element<V> sum_lanes(const V (&v)[kCount]) {
  return sum_lanes(sum_vectors(v));
}
// The largest lane, if none is NaN.
template <class V>
MBK_FN Element<V> max_lanes(V v) {
  return join_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// A vector of floats as vectors of doubles, low lanes first, and back (rounded to nearest even).
inline constexpr int kDoubleParts = lanes<f32v> / lanes<f64v>;
MBK_FN f64v widen_part(f32v x, int part) {
#if MBK_SIMD && defined(__AVX512F__)
  const __m512 v = (__m512)x;
  return (f64v)_mm512_cvtps_pd(part ? _mm512_extractf32x8_ps(v, 1) : _mm512_castps512_ps256(v));
#elif MBK_SIMD
  const __m256 v = (__m256)x;
  return (f64v)_mm256_cvtps_pd(part ? _mm256_extractf128_ps(v, 1) : _mm256_castps256_ps128(v));
#else
  (void)part;
  return (double)x;
#endif
}
#if MBK_SIMD
MBK_FN double widen_part(float x, int) { return (double)x; }
#endif
MBK_FN f32v narrow_parts(const f64v (&x)[kDoubleParts]) {
#if MBK_SIMD && defined(__AVX512F__)
  return (f32v)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)x[0])),
                                  _mm512_cvtpd_ps((__m512d)x[1]), 1);
#elif MBK_SIMD
  return (f32v)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)x[0])),
                                    _mm256_cvtpd_ps((__m256d)x[1]), 1);
#else
  return (float)x[0];
#endif
}

// sum + x * x where x is a float's value: the product is exact in double, so that fused or not the
// result is rounded once.
MBK_FN double add_square(double sum, double x) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(x, x, sum);
#else
  return sum + x * x;
#endif
}
#if MBK_SIMD && defined(__AVX512F__)
MBK_FN f64v add_square(f64v sum, f64v x) {
  return (f64v)_mm512_fmadd_pd((__m512d)x, (__m512d)x, (__m512d)sum);
}
#elif MBK_SIMD
MBK_FN f64v add_square(f64v sum, f64v x) {
  return (f64v)_mm256_fmadd_pd((__m256d)x, (__m256d)x, (__m256d)sum);
}
#endif

// Vectors of T as vectors of double, and back: kDoubleParts for float, the same for double.
template <class V>
inline constexpr int kParts = sizeof(Element<V>) == 8 || lanes<V> == 1 ? 1 : kDoubleParts;
template <class V>
MBK_FN auto to_double(V v, int part) {
  if constexpr (sizeof(Element<V>) == 8) {
    (void)part;
    return v;
  } else {
    return widen_part(v, part);
  }
}
template <class V>
MBK_FN V from_double(const f64v (&parts)[kParts<V>]) {
  if constexpr (sizeof(Element<V>) == 8) {
    return parts[0];
  } else {
    return narrow_parts(parts);
  }
}

}  // namespace mbk::MBK_ISA
