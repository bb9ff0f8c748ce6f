#pragma once
// Elementary functions in fp64, written once for V = double and f64v: as in core/math.h, but
// without fma, which the x86-64 baseline lacks. Each is within 2 ulp on the sampled inputs of
// docs/numerics-elementary.md; every NaN result is 0x7ff8000000000000.
#include "core/math.h"

namespace mbk::MBK_ISA {

// ---- exponentials -------------------------------------------------------------------------------

// ln 2 = kLn2High + kLn2Low; the high part ends in 11 zero bits, so that n times it is exact.
inline constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
inline constexpr double kLog2E = 0x1.71547652b82fep0;

// x = n ln 2 + r. r = high - low is rounded; the two parts are not.
template <class V>
struct Reduced64 {
  V high, low, r;
  Int<V> power;  // n + bias in the low bits
};
template <class V, F64<V> = 0>
MBK_FN Reduced64<V> reduce_exp(V x, double bias = 0) {
  const V magic = splat<V>(0x1.8p52 + bias);
  const V t = x * splat<V>(kLog2E) + magic;
  const V n = t - magic;
  const V high = x - n * splat<V>(kLn2High), low = n * splat<V>(kLn2Low);
  return {high, low, high - low, as_int(t)};
}
// exp(r) = 1 + r (1 + r P(r))
template <class V, F64<V> = 0>
MBK_FN V exp_polynomial(V r) {
  return horner(r, splat<V>(0x1.ad9303ff16be2p-26), 0x1.28adfefa69a53p-22, 0x1.71df18e254781p-19,
                0x1.a019995cdc802p-16, 0x1.a01a012ff2942p-13, 0x1.6c16c18477aefp-10,
                0x1.1111111126b3p-7, 0x1.55555555506bap-5, 0x1.55555555554fep-3,
                0x1.000000000000ap-1);
}
template <class V, F64<V> = 0>
MBK_FN V exp_reduced(V r) {
  return horner(r, exp_polynomial(r), 1.0, 1.0);
}
template <class V, F64<V> = 0>
MBK_FN V scale_down(V p, Int<V> power) {
  return as_float(wrapping_add(as_int(p), shift_left(power, 52))) * splat<V>(0x1p-64);
}

// exp(d) for d <= 0; exactly 0 for d < -700, for -inf and for NaN.
template <class V, F64<V> = 0>
MBK_FN V exp_nonpositive(V d) {
  const Reduced64<V> a = reduce_exp(d);
  const V y = as_float(wrapping_add(as_int(exp_reduced(a.r)), shift_left(a.power, 52)));
  return select(d >= splat<V>(-700.0), y, splat<V>(0.0));
}

template <class V, int n, F64<V> = 0>
MBK_FN void exp_nonpositive(const V (&d)[n], V (&y)[n]) {
  for (int u = 0; u < n; ++u) y[u] = exp_nonpositive(d[u]);
}

template <class V, F64<V> = 0>
MBK_FN V exp(V x) {
  const Reduced64<V> a = reduce_exp(min(splat<V>(710.0), max(splat<V>(-746.0), x)));
  const Int<V> half = shift_left(a.power, 51) & bits_of<V>(-__builtin_inf());
  const Int<V> rest = wrapping_sub(shift_left(a.power, 52), half);
  const V y = as_float(wrapping_add(as_int(exp_reduced(a.r)), rest));
  return canonical_nan(x, y * as_float(wrapping_add(half, bits_of<V>(1.0))));
}

// As in fp32; here expm1(r) takes the two parts of r one by one, which saves a rounding.
template <class V, F64<V> = 0>
MBK_FN V expm1(V x) {
  const Reduced64<V> a = reduce_exp(min(splat<V>(710.0), max(splat<V>(-40.0), x)), 1022);
  const V P = horner(a.r, splat<V>(0x1.ae77778d8f664p-26), 0x1.28a28f518161p-22,
                     0x1.71de8109f7c6ep-19, 0x1.a019a6a16c1d3p-16, 0x1.a01a0177f21b9p-13,
                     0x1.6c16c17f2f17p-10, 0x1.1111111118831p-7, 0x1.555555555210cp-5,
                     0x1.555555555553bp-3, 0x1.0000000000005p-1);
  const V p = a.high + (a.r * a.r * P - a.low);
  const Int<V> power = shift_left(a.power, 52);  // the bits of 2^(n-1)
  const V inverse = as_float(wrapping_sub(bits_of<V>(0x1p1023), power));
  const V y = as_float(power) * (splat<V>(2.0) * p + (splat<V>(2.0) - inverse));
  return canonical_nan(x, or_sign(y, x));
}

// sigmoid(x) = b (1 - e / (1 + e)), e = exp(-|x|), with b = e where x < 0, else 1.
template <class V, F64<V> = 0>
MBK_FN V sigmoid(V x) {
  const Reduced64<V> a = reduce_exp(max(splat<V>(-746.0), -abs(x)), 64);
  const V one = splat<V>(1.0);
  const V p = one + (a.high + (a.r * a.r * exp_polynomial(a.r) - a.low));
  const V e = scale_down(p, a.power);
  const V b = select(x < splat<V>(0.0), e, one);
  return canonical_nan(x, b - b * (e / (one + e)));
}

template <class V, F64<V> = 0>
MBK_FN V tanh(V x) {
  const V a = min(splat<V>(20.0), abs(x)), magic = splat<V>(0x1.8p52 + 1023);
  const V rounded = (a * splat<V>(2 * kLog2E) - splat<V>(0.25)) + magic;
  const V n = rounded - magic;
  const V v = (a - n * splat<V>(0.5 * kLn2High)) - n * splat<V>(0.5 * kLn2Low);
  const V z = v * v;
  const V P = horner(z, splat<V>(-0x1.5b213342df5ap-10), 0x1.d541adb2ff585p-9,
                     -0x1.2269a0691b395p-7, 0x1.664f3abde9f5ep-6, -0x1.ba1ba1a661bbcp-5,
                     0x1.111111110bc5dp-3, -0x1.555555555554ep-2);
  const V t = v + v * (z * P);
  const V p = as_float(shift_left(as_int(rounded), 52));
  const V s = (p + splat<V>(1.0)) * t + (p - splat<V>(1.0));
  const V y = s / (s + (splat<V>(2.0) - splat<V>(2.0) * t));
  return canonical_nan(x, or_sign(y, x));
}

// ---- logarithms ---------------------------------------------------------------------------------

// (k + 1023) 2^52 for a number 2^k m with sqrt(1/2) <= m < sqrt(2), from its bits.
template <class V, F64<V> = 0>
MBK_FN Int<V> biased_exponent(Int<V> bits) {
  const Int<V> offset = wrapping_sub(bits_of<V>(1.0), bits_of<V>(0x1.6a09e667f3bcdp-1));
  return wrapping_add(bits, offset) & bits_of<V>(__builtin_inf());
}
// bias - k as a number; +0 for k = 0 and no bias, so that its product leaves a result of -0 alone.
template <class V, F64<V> = 0>
MBK_FN V minus_exponent(Int<V> biased, V bias) {
  const V k = as_float(shift_right(biased, 52) | bits_of<V>(0x1p52));  // 2^52 + 1023 too large
  return (bias + splat<V>(0x1p52 + 1023)) - k;
}
// log(1 + f) + k ln 2, where log(1 + f) = 2 atanh(s) = f - s (f - z P(z)), s = f / (2 + f) and
// z = s^2.
template <class V, F64<V> = 0>
MBK_FN V log_reduced(V f, V minus_k) {
  const V s = f / (f + splat<V>(2.0));
  const V z = s * s;
  const V P = horner(z, splat<V>(0x1.2b5f5b2f7190cp-3), 0x1.39fdcbbcee0e7p-3, 0x1.7462b925f9f72p-3,
                     0x1.c71c62d649d8dp-3, 0x1.2492492dfb9b8p-2, 0x1.99999999952b9p-2,
                     0x1.5555555555558p-1);
  const V low = s * (f - z * P) + minus_k * splat<V>(kLn2Low);
  return (f - low) - minus_k * splat<V>(kLn2High);
}

template <class V, F64<V> = 0>
MBK_FN V log(V x) {
  const auto tiny = x < splat<V>(0x1p-1022);
  const Int<V> i = as_int(select(tiny, x * splat<V>(0x1p54), x));
  const Int<V> biased = biased_exponent<V>(i);
  const V m = as_float(wrapping_sub(wrapping_add(i, bits_of<V>(1.0)), biased));
  const V minus_k = minus_exponent(biased, select(tiny, splat<V>(54.0), splat<V>(0.0)));
  return log_edges(x, 0.0, log_reduced(m - splat<V>(1.0), minus_k));
}

// log1p(x) for x in (-1, inf): f as in fp32.
template <class V, F64<V> = 0>
MBK_FN V log1p_inside(V x) {
  const Int<V> biased = biased_exponent<V>(as_int(x + splat<V>(1.0)));
  const V h = as_float(wrapping_sub(bits_of<V>(-0.0), biased));  // 4 2^-k
  const V f = splat<V>(0.25) * (x * h - (splat<V>(4.0) - h));
  return log_reduced(f, minus_exponent(biased, splat<V>(0.0)));
}
template <class V, F64<V> = 0>
MBK_FN V log1p(V x) {
  return log_edges(x, -1.0, log1p_inside(x));
}

template <class V, F64<V> = 0>
MBK_FN V exp_of_minus_abs(V x) {
  const Reduced64<V> a = reduce_exp(max(splat<V>(-746.0), -abs(x)), 64);
  return scale_down(exp_reduced(a.r), a.power);
}
template <class V, F64<V> = 0>
MBK_FN V log1p_of_exp(V e) {
  return log1p_inside(e);
}
template <class V, F64<V> = 0>
MBK_FN V softplus(V x) {
  return canonical_nan(x, max(x, splat<V>(0.0)) + log1p_of_exp(exp_of_minus_abs(x)));
}

// Where |x| < 1 from the derivative t: -log(1 - t^2) / 2.
template <class V, F64<V> = 0>
MBK_FN V log_cosh_exp(V x) {
  return exp_of_minus_abs(x + x);
}
template <class V, F64<V> = 0>
MBK_FN LogCoshOf<V> log_cosh(V x, V e) {
  const V t = tanh(x), a = abs(x);
  const V near = log1p(-(t * t)) * splat<V>(-0.5);
  const V far = a + (log1p_of_exp(e) - splat<V>(0x1.62e42fefa39efp-1));
  return {select(a < splat<V>(1.0), near, far), t};
}

}  // namespace mbk::MBK_ISA
