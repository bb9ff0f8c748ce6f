#pragma once
// Numbers told apart by their kind: NaN, zero, infinite, negative, positive. On AVX-512 one
// instruction looks the answer up in a table; elsewhere it takes comparisons.
#include "core/lane.h"

namespace mbk::MBK_ISA {

template <class V>
MBK_FN auto is_nan(V x) {
  return x != x;
}
// The one NaN: 0x7fc00000, 0x7ff8000000000000.
template <class V>
MBK_FN V quiet_nan() {
  return splat<V>(sizeof(Element<V>) == 4 ? (Element<V>)as_float((int32_t)0x7fc00000)
                                          : (Element<V>)as_float((int64_t)0x7ff8000000000000));
}
// x, or the one NaN.
template <class V>
MBK_FN V canonical(V x) {
  return select(is_nan(x), quiet_nan<V>(), x);
}
// Lanes in which one of two is NaN.
template <class V>
MBK_FN auto either_nan(V a, V b) {
  return is_nan(a) | is_nan(b);
}
// 1, -1, and 0 for 0 and NaN, as in torch.
template <class V>
MBK_FN V sign(V x) {
  const V zero = V{}, one = splat<V>(1);
  return select(x > zero, one, select(x < zero, -one, zero));
}
// 1 where x >= 0, else 0, also for NaN.
template <class V>
MBK_FN V unit_step(V x) {
  return select(x >= V{}, splat<V>(1), V{});
}

#if MBK_SIMD && defined(__AVX512F__)
// Tables have a digit a kind, from the lowest: quiet and signalling NaN, 0, 1, -inf, inf, negative,
// positive. Digits are answers: 0 the first operand, 1 the second, 3 a NaN, 4 -inf, 5 inf, 8 zero,
// 9 -1, a 1.
inline constexpr uint32_t kNumberOrFirst = 0x11111100, kLogEdges = 0x03530433, kSign = 0xa9a9a888,
                          kUnitStep = 0xa8a8aa88;
template <uint32_t kTable>
MBK_FN f32v by_kind(f32v first, f32v x) {
  return (f32v)_mm512_fixupimm_ps((__m512)first, (__m512)x, _mm512_set1_epi32((int)kTable), 0);
}
template <uint32_t kTable>
MBK_FN f64v by_kind(f64v first, f64v x) {
  return (f64v)_mm512_fixupimm_pd((__m512d)first, (__m512d)x, _mm512_set1_epi64(kTable), 0);
}
MBK_FN f32v canonical(f32v x) { return by_kind<kNumberOrFirst>(quiet_nan<f32v>(), x); }
MBK_FN f64v canonical(f64v x) { return by_kind<kNumberOrFirst>(quiet_nan<f64v>(), x); }
MBK_FN f32v sign(f32v x) { return by_kind<kSign>(x, x); }
MBK_FN f64v sign(f64v x) { return by_kind<kSign>(x, x); }
MBK_FN f32v unit_step(f32v x) { return by_kind<kUnitStep>(x, x); }
MBK_FN f64v unit_step(f64v x) { return by_kind<kUnitStep>(x, x); }
MBK_FN i32v either_nan(f32v a, f32v b) {
  return (i32v)_mm512_movm_epi32(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q));
}
MBK_FN i64v either_nan(f64v a, f64v b) {
  return (i64v)_mm512_movm_epi64(_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_UNORD_Q));
}
#elif MBK_SIMD
MBK_FN i32v either_nan(f32v a, f32v b) {
  return (i32v)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
}
MBK_FN i64v either_nan(f64v a, f64v b) {
  return (i64v)_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_UNORD_Q);
}
#endif

}  // namespace mbk::MBK_ISA
