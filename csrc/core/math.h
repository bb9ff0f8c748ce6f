#pragma once
// Elementary functions in fp32, written once for V = float and f32v. Each is one fixed sequence of
// fma, add, multiply, divide and integer steps, without branches or tables: the same bits on every
// chip.
//
// "ulp" in a comment bounds the error over all 2^32 inputs, in units in the last place of the exact
// result; docs/numerics-elementary.md has the measured worst. Denormal inputs and results are
// right, every NaN result is 0x7fc00000, zeros keep their sign as in C99. Polynomials are minimax
// fits with fp32 coefficients. The caller sees to the default floating-point environment
// (core/environment.h).
#include "core/kinds.h"

namespace mbk::MBK_ISA {

// ---- steps shared with fp64 ---------------------------------------------------------------------

// Overloads for lanes of fp32 (F32<V>) and of fp64 (F64<V>, in math64.h).
template <bool>
struct If {};
template <>
struct If<true> {
  typedef int type;
};
template <class V>
using F32 = typename If<sizeof(Element<V>) == 4>::type;
template <class V>
using F64 = typename If<sizeof(Element<V>) == 8>::type;

// Shifts and sums of bits, which may overflow: C++ leaves that undefined for signed types.
MBK_FN int32_t shift_left(int32_t a, int n) { return (int32_t)((uint32_t)a << n); }
MBK_FN int64_t shift_left(int64_t a, int n) { return (int64_t)((uint64_t)a << n); }
MBK_FN int64_t shift_right(int64_t a, int n) { return (int64_t)((uint64_t)a >> n); }
MBK_FN int32_t wrapping_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
MBK_FN int64_t wrapping_add(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
MBK_FN int32_t wrapping_sub(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }
MBK_FN int64_t wrapping_sub(int64_t a, int64_t b) { return (int64_t)((uint64_t)a - (uint64_t)b); }
MBK_FN float to_float(int32_t i) { return (float)i; }
#if MBK_SIMD
typedef uint32_t u32v __attribute__((vector_size(kBytes)));
typedef uint64_t u64v __attribute__((vector_size(kBytes)));
MBK_FN i32v shift_left(i32v a, int n) { return (i32v)((u32v)a << n); }
MBK_FN i64v shift_left(i64v a, int n) { return (i64v)((u64v)a << n); }
MBK_FN i64v shift_right(i64v a, int n) { return (i64v)((u64v)a >> n); }
MBK_FN i32v wrapping_add(i32v a, i32v b) { return (i32v)((u32v)a + (u32v)b); }
MBK_FN i64v wrapping_add(i64v a, i64v b) { return (i64v)((u64v)a + (u64v)b); }
MBK_FN i32v wrapping_sub(i32v a, i32v b) { return (i32v)((u32v)a - (u32v)b); }
MBK_FN i64v wrapping_sub(i64v a, i64v b) { return (i64v)((u64v)a - (u64v)b); }
MBK_FN f32v to_float(i32v i) { return __builtin_convertvector(i, f32v); }
#endif

// The bits of a number, in every lane.
template <class V>
MBK_FN Int<V> bits_of(Element<V> x) {
  return as_int(splat<V>(x));
}
// c0 + x (c1 + x (c2 + ...)), highest coefficient first.
template <class V>
MBK_FN V horner(V, V sum) {
  return sum;
}
template <class V, class... C>
MBK_FN V horner(V x, V sum, Element<V> c, C... lower) {
  return horner(x, multiply_add(sum, x, splat<V>(c)), lower...);
}
// The same of several vectors, a step of all at a time: sum becomes the result.
template <class V, int n>
MBK_FN void horner(const V (&)[n], V (&)[n]) {}
template <class V, int n, class... C>
MBK_FN void horner(const V (&x)[n], V (&sum)[n], Element<V> c, C... lower) {
  for (int u = 0; u < n; ++u) sum[u] = multiply_add(sum[u], x[u], splat<V>(c));
  horner(x, sum, lower...);
}
template <class V>
MBK_FN V canonical_nan(V x, V y) {  // y, or the one NaN where x is NaN
  return select(x == x, y, quiet_nan<V>());
}
// y, with the sign bit of x or-ed in.
template <class V>
MBK_FN V or_sign(V y, V x) {
  return as_float(as_int(y) | (as_int(x) & bits_of<V>(Element<V>(-0.0f))));
}
// y for x in (edge, inf); -inf at the edge, NaN below it and for NaN, inf for inf.
template <class V>
MBK_FN V log_edges(V x, Element<V> edge, V y) {
#if MBK_SIMD && defined(__AVX512F__)
  if constexpr (kScales<V>) {
    const V above = x - splat<V>(edge);  // 0 at the edge only, as the edge is 0 or -1
    return canonical(by_kind<kLogEdges>(y, above));
  }
#endif
  const V inf = splat<V>(Element<V>(__builtin_inff()));
  const V low = splat<V>(edge);
  return select(x == inf, inf, select(x > low, y, select(x == low, -inf, quiet_nan<V>())));
}

// ---- exponentials -------------------------------------------------------------------------------

// x = n ln 2 + r, |r| <= ln 2 / 2. The low bits of `power` hold n + bias.
template <class V>
struct Reduced {
  V r, n;
  Int<V> power;
};
template <class V, int n, F32<V> = 0>
MBK_FN void reduce_exp(const V (&x)[n], Reduced<V> (&a)[n], float bias = 0) {
  const V magic = splat<V>(0x1.8p23f + bias);  // adding it rounds to an integer
  V t[n];
  for (int u = 0; u < n; ++u) t[u] = fma(x[u], splat<V>(0x1.715476p0f), magic);
  for (int u = 0; u < n; ++u) a[u].n = t[u] - magic, a[u].power = as_int(t[u]);
  for (int u = 0; u < n; ++u) a[u].r = fma(a[u].n, splat<V>(-0x1.62e43p-1f), x[u]);  // exact
  for (int u = 0; u < n; ++u) a[u].r = fma(a[u].n, splat<V>(0x1.05c61p-29f), a[u].r);
}
template <class V, F32<V> = 0>
MBK_FN Reduced<V> reduce_exp(V x, float bias = 0) {
  const V one[1] = {x};
  Reduced<V> a[1];
  reduce_exp(one, a, bias);
  return a[0];
}
// exp(r) = 1 + r (1 + r P(r))
template <class V, int n, F32<V> = 0>
MBK_FN void exp_reduced(const Reduced<V> (&a)[n], V (&y)[n]) {
  V r[n];
  for (int u = 0; u < n; ++u) r[u] = a[u].r, y[u] = splat<V>(0x1.6a5a54p-10f);
  horner(r, y, 0x1.123aecp-7f, 0x1.5558a6p-5f, 0x1.55549p-3f, 0x1.fffffcp-2f, 1.0f, 1.0f);
}
template <class V, F32<V> = 0>
MBK_FN V exp_reduced(const Reduced<V>& a) {
  const Reduced<V> one[1] = {a};
  V y[1];
  exp_reduced(one, y);
  return y[0];
}

// exp(d) for d <= 0, the term of a softmax: 0.9 ulp. Exactly 0 for d < -80 (so it is never
// denormal), for -inf and for NaN; exactly 1 for 0. The hot loop of the library: ten fp steps, two
// integer steps; of several vectors a step at a time, so that one fills the waits of the others: d
// is read again at the end, so y must not be d.
template <class V, int n, F32<V> = 0>
MBK_FN void exp_nonpositive(const V (&d)[n], V (&y)[n]) {
  Reduced<V> a[n];
  reduce_exp(d, a);
  exp_reduced(a, y);
  for (int u = 0; u < n; ++u)
    y[u] = as_float(wrapping_add(as_int(y[u]), shift_left(a[u].power, 23)));
  for (int u = 0; u < n; ++u) y[u] = select(d[u] >= splat<V>(-80.0f), y[u], splat<V>(0.0f));
}
template <class V, F32<V> = 0>
MBK_FN V exp_nonpositive(V d) {
  const V one[1] = {d};
  V y[1];
  exp_nonpositive(one, y);
  return y[0];
}

// exp(x): 0.9 ulp. Without scale() 2^n is applied in two factors, since n reaches from -150 to 128.
template <class V, F32<V> = 0>
MBK_FN V exp(V x) {
  const Reduced<V> a = reduce_exp(min(splat<V>(89.0f), max(splat<V>(-104.0f), x)));
  if constexpr (kScales<V>) return canonical(scale(exp_reduced(a), a.n));
  const Int<V> half = shift_left(a.power, 22) & bits_of<V>(-__builtin_inff());  // floor(n / 2) 2^23
  const Int<V> rest = wrapping_sub(shift_left(a.power, 23), half);
  const V y = as_float(wrapping_add(as_int(exp_reduced(a)), rest));
  return canonical_nan(x, y * as_float(wrapping_add(half, bits_of<V>(1.0f))));
}

// expm1(x) = 2^(n-1) (2 expm1(r) + (2 - 2^(1-n))): 2 ulp. No factor overflows; n = 0 gives
// expm1(r).
template <class V, F32<V> = 0>
MBK_FN V expm1(V x) {
  const Reduced<V> a = reduce_exp(min(splat<V>(89.0f), max(splat<V>(-20.0f), x)), 126);
  const V P =
      horner(a.r, splat<V>(0x1.6cb78ep-10f), 0x1.122912p-7f, 0x1.555566p-5f, 0x1.5554aep-3f, 0.5f);
  const V p = fma(a.r * a.r, P, a.r);
  const Int<V> power = shift_left(a.power, 23);  // the bits of 2^(n-1)
  const V inverse = as_float(wrapping_sub(bits_of<V>(0x1p127f), power));
  const V y = as_float(power) * fma(p, splat<V>(2.0f), splat<V>(2.0f) - inverse);
  return canonical_nan(x, or_sign(y, x));  // the sign is lost only of -0
}

// p 2^n, denormal where it must be; `power` has a bias of 64.
template <class V, F32<V> = 0>
MBK_FN V scale_down(V p, const Reduced<V>& a) {
  if constexpr (kScales<V>) return scale(p, a.n);
  return as_float(wrapping_add(as_int(p), shift_left(a.power, 23))) * splat<V>(0x1p-64f);
}

// sigmoid(x) = 1 / (1 + exp(-x)): 2 ulp. With c = 3/2 and e = c exp(-|x|) it is c / (c + e), or e /
// (c + e) where x < 0. With c = 1 the numbers just above a power of two would round badly: 2.4 ulp.
template <class V, F32<V> = 0>
MBK_FN V sigmoid(V x) {
  const Reduced<V> a = reduce_exp(max(splat<V>(-105.0f), -abs(x)), 64);
  const V p = horner(a.r, splat<V>(0x1.0f431cp-9f), 0x1.9b5862p-7f, 0x1.000338p-4f, 0x1.fffed8p-3f,
                     0x1.7ffffcp-1f, 1.5f, 1.5f);
  const V e = scale_down(p, a), c = splat<V>(1.5f);
  return canonical_nan(x, select(x < splat<V>(0.0f), e, c) / (c + e));
}

// exp(-|x|), and log(1 + e) = e + e^2 P(e) of it; NaN is the caller's where not kScales<V>.
template <class V, F32<V> = 0>
MBK_FN V exp_of_minus_abs(V x) {
  const Reduced<V> a = reduce_exp(max(splat<V>(-104.0f), -abs(x)), 64);
  return scale_down(exp_reduced(a), a);
}
template <class V, F32<V> = 0>
MBK_FN V log1p_of_exp(V e) {
  const V P =
      horner(e, splat<V>(-0x1.b22adep-9f), 0x1.4a9226p-6f, -0x1.d7efa8p-5f, 0x1.b53c48p-4f,
             -0x1.3a6736p-3f, 0x1.935568p-3f, -0x1.ff2556p-3f, 0x1.554ddap-2f, -0x1.ffffd2p-2f);
  return fma(e * e, P, e);
}
// softplus(x) = log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)): 2 ulp.
template <class V, F32<V> = 0>
MBK_FN V softplus(V x) {
  return canonical_nan(x, max(x, splat<V>(0.0f)) + log1p_of_exp(exp_of_minus_abs(x)));
}

// tanh(x): 2 ulp. With |x| = n ln 2 / 2 + v, p = 2^n and t = tanh(v) = v + v^3 P(v^2),
//   tanh |x| = s / (s + 2 (1 - t)), s = (p - 1) + (p + 1) t,
// which is t itself where n = 0 (|x| < 0.26), never above 1, and 1 from |x| = 10 on. The
// denominator is formed from s so that the rounding of s all but cancels where the answer is
// near 1.
template <class V, F32<V> = 0>
MBK_FN V tanh(V x) {
  const V a = min(splat<V>(10.0f), abs(x)), magic = splat<V>(0x1.8p23f + 127);
  const V rounded = fma(a, splat<V>(0x1.715476p1f), splat<V>(-0.25f)) + magic;
  const V n = rounded - magic;
  const V v = fma(n, splat<V>(0x1.05c61p-30f), fma(n, splat<V>(-0x1.62e43p-2f), a));
  const V z = v * v;
  const V P = horner(z, splat<V>(-0x1.a87c24p-5f), 0x1.10f4cep-3f, -0x1.555548p-2f);
  const V t = fma(z * P, v, v);
  const V p = as_float(shift_left(as_int(rounded), 23));
  const V s = fma(p + splat<V>(1.0f), t, p - splat<V>(1.0f));
  const V y = s / (s + fma(t, splat<V>(-2.0f), splat<V>(2.0f)));
  return canonical_nan(x, or_sign(y, x));
}

// ---- logarithms ---------------------------------------------------------------------------------

// -k 2^23 for a number 2^k m with sqrt(1/2) < m <= sqrt(2), from its bits. For k = 0 it is +0, and
// its product with a negative number -0, which leaves a sum with -0 alone.
template <class V, F32<V> = 0>
MBK_FN Int<V> minus_exponent(Int<V> bits) {
  return wrapping_sub(bits_of<V>(0x1.6a09e6p0f), bits) & bits_of<V>(-__builtin_inff());
}
// log(1 + f) + k ln 2 = f + f^2 P(f) + k ln 2
template <class V, F32<V> = 0>
MBK_FN V log_reduced(V f, Int<V> minus_k) {
  const V P = horner(f, splat<V>(0x1.660ee2p-4f), -0x1.251406p-3f, 0x1.317e22p-3f, -0x1.535a3cp-3f,
                     0x1.98d336p-3f, -0x1.0004bp-2f, 0x1.5556f2p-2f, -0x1.fffffap-2f);
  return fma(to_float(minus_k), splat<V>(-0x1.62e43p-24f), fma(f * f, P, f));
}

// log(x): 2 ulp. Denormals are scaled by 2^23 first.
template <class V, F32<V> = 0>
MBK_FN V log(V x) {
  const auto tiny = x < splat<V>(0x1p-126f);
  const Int<V> i = as_int(select(tiny, x * splat<V>(0x1p23f), x));
  const Int<V> minus_k = minus_exponent<V>(i);
  const V f = as_float(wrapping_add(i, minus_k)) - splat<V>(1.0f);
  const Int<V> scaled = as_int(select(tiny, splat<V>(0x1p-104f), splat<V>(0.0f)));  // 23 2^23
  return log_edges(x, 0.0f, log_reduced(f, wrapping_add(minus_k, scaled)));
}

// log1p(x) = k ln 2 + log(1 + f), f = 2^-k x - (1 - 2^-k), with k from the rounded 1 + x: 2 ulp.
// f is rounded once and is x itself where k = 0. It is formed 4 times too large, as 2^-128 is
// denormal.
template <class V, F32<V> = 0>
MBK_FN V log1p(V x) {
  const V four = splat<V>(4.0f);
  const Int<V> minus_k = minus_exponent<V>(as_int(x + splat<V>(1.0f)));
  const V h = as_float(wrapping_add(as_int(four), minus_k));  // 4 2^-k
  const V f = splat<V>(0.25f) * fma(x, h, -(four - h));
  return log_edges(x, -1.0f, log_reduced(f, minus_k));
}

// log(cosh(x)) and its derivative tanh(x): 2 ulp each (in fp64 7 ulp and 2). Where |x| < 1 both are
// polynomials of x^2, which do not cancel; elsewhere, with e = log_cosh_exp(x) = exp(-2|x|), they
// are |x| - log 2 + log(1 + e) and +-(1 - 2 e / (1 + e)). A NaN stays one, but which is the
// caller's.
template <class V>
struct LogCoshOf {
  V value, slope;
};
template <class V, F32<V> = 0>
MBK_FN V log_cosh_exp(V x) {
  return exp_nonpositive(abs(x) * splat<V>(-2.0f));
}
template <class V, F32<V> = 0>
MBK_FN LogCoshOf<V> log_cosh(V x, V e) {
  const V one = splat<V>(1.0f), a = abs(x), z = a * a;
  const V Q = horner(z, splat<V>(0x1.7088e6p-14f), -0x1.25d03p-11f, 0x1.10f5d2p-9f, -0x1.b7f9d8p-8f,
                     0x1.6c02bcp-6f, -0x1.555516p-4f);
  const V near = fma(z * z, Q, z * splat<V>(0.5f));
  const V P = horner(z, splat<V>(-0x1.77d628p-12f), 0x1.2da3p-9f, -0x1.04609ep-7f, 0x1.6009c6p-6f,
                     -0x1.b9623cp-5f, 0x1.110be4p-3f, -0x1.55553cp-2f);
  const V tail = horner(e, splat<V>(0x1.32522ep-3f), -0x1.f36146p-3f, 0x1.55005cp-2f,
                        -0x1.fffe72p-2f);  // for e < e^-2 only
  const V far = fma(e * e, tail, e) + (a - splat<V>(0x1.62e43p-1f));
  const V far_slope = one - (e + e) / (one + e);
  const auto is_far = a >= one;  // no NaN is
  return {select(is_far, far, near), or_sign(select(is_far, far_slope, fma(a * z, P, a)), x)};
}

}  // namespace mbk::MBK_ISA
