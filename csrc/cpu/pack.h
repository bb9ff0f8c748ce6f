#pragma once
// Operands of a product in the order in which a tile of C reads them: for each step of the depth
// kWidth elements, one after the other, widened; or, of bf16, pairs of steps as words of 32 bits.
#include "core/dtype.h"
#include "core/product_args.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class S>
MBK_FN const S* begin_of(const Operand& o, int64_t k, int64_t i) {
  return (const S*)o.data + k * o.depth_stride + i * o.stride;
}

// What is packed: element (k, i), and vectors of those next to each other in memory. `from` is
// element (0, 0); steps of the depth lie `down` apart, and the tile's rows or columns `across`.
template <class S>
struct Elements {
  typedef Compute<S> T;
  typedef Vector<T> V;
  const S* from;
  int64_t down, across;

  MBK_FN T one(int64_t k, int64_t i) const { return widen(from[k * down + i * across]); }
  MBK_FN V along_depth(int64_t k, int64_t i) const { return load<V>(from + k + i * across); }
  MBK_FN V along_width(int64_t k, int64_t i) const { return load<V>(from + k * down + i); }
};

// Words of two steps of the depth, the first one low. They are only moved: no number is a float.
// (The tile and largest_of_pairs read them as integers, beyond a call that no compiler looks into.)
struct Pairs {
  typedef float T;
  typedef f32v V;
  const uint16_t* from;
  int64_t down, across;  // of single steps

  MBK_FN T word(uint32_t low, uint32_t high) const { return as_float((int32_t)(low | high << 16)); }
  MBK_FN T one(int64_t k, int64_t i) const {
    const uint16_t* const low = from + 2 * k * down + i * across;
    return word(low[0], low[down]);
  }
  MBK_FN V along_depth(int64_t k, int64_t i) const {
    V v;
    memcpy(&v, from + 2 * k + i * across, sizeof v);
    return v;
  }
  MBK_FN V along_width(int64_t k, int64_t i) const {
    const uint16_t* const low = from + 2 * k * down + i;
    Int<V> v;
    uint16_t half[2][lanes<V>];
    memcpy(half[0], low, sizeof half[0]);
    memcpy(half[1], low + down, sizeof half[1]);
    for (int l = 0; l < lanes<V>; ++l)
      ((int32_t*)&v)[l] = (int32_t)((uint32_t)half[0][l] | (uint32_t)half[1][l] << 16);
    return as_float(v);
  }
};

// The four vectors' lanes l to to[l * stride], four numbers each.
#if MBK_SIMD
inline constexpr int kQuad = 4;
#if defined(__AVX512F__)
MBK_FN void store_lanes(float* to, int64_t stride, const f32v (&v)[kQuad]) {
  const __m512 a = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]);
  const __m512 b = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]);
  const __m512 d = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
  const __m512 lane[kQuad] = {_mm512_shuffle_ps(a, c, 0x44), _mm512_shuffle_ps(a, c, 0xee),
                              _mm512_shuffle_ps(b, d, 0x44), _mm512_shuffle_ps(b, d, 0xee)};
  for (int l = 0; l < kQuad; ++l, to += stride) {
    _mm_storeu_ps(to, _mm512_castps512_ps128(lane[l]));
    _mm_storeu_ps(to + 4 * stride, _mm512_extractf32x4_ps(lane[l], 1));
    _mm_storeu_ps(to + 8 * stride, _mm512_extractf32x4_ps(lane[l], 2));
    _mm_storeu_ps(to + 12 * stride, _mm512_extractf32x4_ps(lane[l], 3));
  }
}
#else
MBK_FN void store_lanes(float* to, int64_t stride, const f32v (&v)[kQuad]) {
  const __m256 a = _mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]);
  const __m256 b = _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]);
  const __m256 d = _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]);
  const __m256 lane[kQuad] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xee),
                              _mm256_shuffle_ps(b, d, 0x44), _mm256_shuffle_ps(b, d, 0xee)};
  for (int l = 0; l < kQuad; ++l, to += stride) {
    _mm_storeu_ps(to, _mm256_castps256_ps128(lane[l]));
    _mm_storeu_ps(to + 4 * stride, _mm256_extractf128_ps(lane[l], 1));
  }
}
#endif
#endif

// Neighbours lie along the depth: blocks of four by a vector's lanes are transposed in registers.
template <int kWidth, class From>
MBK_FN void pack_along_depth(typename From::T* to, const From& from, int64_t depth) {
  typedef typename From::V V;
  constexpr int64_t kRun = 64;  // a few lines of each row are in use at a time
  for (int64_t begin = 0; begin < depth; begin += kRun) {
    const int64_t end = smaller(begin + kRun, depth);
    int64_t whole = begin;
#if MBK_SIMD
    if constexpr (sizeof(typename From::T) == 4) {
      static_assert(kWidth >= kQuad);
      whole += (end - begin) / lanes<V> * lanes<V>;
      for (int64_t i = 0; i < kWidth; i += kQuad) {
        if (i > kWidth - kQuad) i = kWidth - kQuad;  // some rows once more
        for (int64_t k = begin; k < whole; k += lanes<V>) {
          const V rows[kQuad] = {from.along_depth(k, i), from.along_depth(k, i + 1),
                                 from.along_depth(k, i + 2), from.along_depth(k, i + 3)};
          store_lanes(to + k * kWidth + i, kWidth, rows);
        }
      }
    }
#endif
    for (int64_t i = 0; i < kWidth; ++i)
      for (int64_t k = whole; k < end; ++k) to[k * kWidth + i] = from.one(k, i);
  }
}

// Widths in whole vectors: the last one may hang over, to be overwritten by the next step.
template <int kWidth, class V>
inline constexpr int kWidthRead = (kWidth + lanes<V> - 1) / lanes<V> * lanes<V>;

// `count` elements are there, at least one; 0 past them. `to` has room for a vector more.
template <int kWidth, class From>
MBK_FN void pack_steps(typename From::T* to, const From& from, int64_t depth, int64_t count) {
  typedef typename From::V V;
  if (from.across == 1 && count >= kWidthRead<kWidth, V>) {
    for (int64_t k = 0; k < depth; ++k)
      for (int i = 0; i < kWidth; i += lanes<V>) store(to + k * kWidth + i, from.along_width(k, i));
  } else if (from.down == 1 && count >= kWidth) {
    pack_along_depth<kWidth>(to, from, depth);
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < kWidth; ++i)
        to[k * kWidth + i] = i < count ? from.one(k, i) : (typename From::T)0;
  }
}

// to(k, i) = o(k, i), for `depth` by kWidth elements from (first_k, first) on; 0 past `count`.
typedef void (*Pack)(void* to, const Operand& o, int64_t first_k, int64_t first, int64_t depth,
                     int64_t count);

template <int kWidth, class S>
MBK_PASS void pack(void* to, const Operand& o, int64_t first_k, int64_t first, int64_t depth,
                   int64_t count) {
  const Elements<S> from{begin_of<S>(o, first_k, first), o.depth_stride, o.stride};
  pack_steps<kWidth>((Compute<S>*)to, from, depth, count);
}

// The last step of an odd depth is paired with 0.
template <int kWidth>
MBK_PASS void pack_pairs(void* to, const Operand& o, int64_t first_k, int64_t first, int64_t depth,
                         int64_t count) {
  const Pairs from{begin_of<uint16_t>(o, first_k, first), o.depth_stride, o.stride};
  pack_steps<kWidth>((float*)to, from, depth / 2, count);
  if (depth % 2 == 0) return;
  const uint16_t* const last = from.from + (depth - 1) * from.down;
  float* const rest = (float*)to + depth / 2 * kWidth;
  for (int64_t i = 0; i < kWidth; ++i)
    rest[i] = from.word(i < count ? last[i * from.across] : 0, 0);
}

template <int kWidth>
Pack find_pack(DType type) {
  switch (type) {
    case DType::f32:
      return &pack<kWidth, float>;
    case DType::bf16:
      return &pack<kWidth, bf16>;
    case DType::f16:
      return &pack<kWidth, f16>;
    default:
      return nullptr;
  }
}

}  // namespace
}  // namespace mbk::MBK_ISA
