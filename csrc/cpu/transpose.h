#pragma once
// As many vectors as a vector has lanes, transposed: lane l of vector k becomes lane k of vector l.
#include "core/lane.h"

#if MBK_SIMD
namespace mbk::MBK_ISA {
namespace {

// a_0, b_0, a_1, b_1, ...: the lower half, and the upper one.
#if defined(__AVX512F__)
MBK_FN void interleave(f32v a, f32v b, f32v& low, f32v& high) {
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = (f32v)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
  high = (f32v)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(from, _mm512_set1_epi32(8)),
                                      (__m512)b);
}
MBK_FN void interleave(f64v a, f64v b, f64v& low, f64v& high) {
  const __m512i from = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  low = (f64v)_mm512_permutex2var_pd((__m512d)a, from, (__m512d)b);
  high = (f64v)_mm512_permutex2var_pd((__m512d)a, _mm512_add_epi64(from, _mm512_set1_epi64(4)),
                                      (__m512d)b);
}
#else
MBK_FN void interleave(f32v a, f32v b, f32v& low, f32v& high) {
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b);  // of each half of a vector
  const __m256 odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (f32v)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (f32v)_mm256_permute2f128_ps(even, odd, 0x31);
}
MBK_FN void interleave(f64v a, f64v b, f64v& low, f64v& high) {
  const __m256d even = _mm256_unpacklo_pd((__m256d)a, (__m256d)b);
  const __m256d odd = _mm256_unpackhi_pd((__m256d)a, (__m256d)b);
  low = (f64v)_mm256_permute2f128_pd(even, odd, 0x20);
  high = (f64v)_mm256_permute2f128_pd(even, odd, 0x31);
}
#endif

// Each interleaving of the first half of the vectors with the second moves a bit of an element's
// place among the lanes to its place among the vectors.
template <class V>
MBK_FN void transpose(V (&v)[lanes<V>]) {
  constexpr int n = lanes<V>;
  for (int step = 1; step < n; step *= 2) {
    V moved[n];
    for (int k = 0; k < n / 2; ++k) interleave(v[k], v[k + n / 2], moved[2 * k], moved[2 * k + 1]);
    for (int k = 0; k < n; ++k) v[k] = moved[k];
  }
}

}  // namespace
}  // namespace mbk::MBK_ISA
#endif
