#pragma once
// What element-wise losses are made of. A loss has
//
//   name      its name in mbkern.functional
//   kInputs   2 or 3: input, target and a third tensor, x[0], x[1], x[2] below
//   Call<T>   its parameters, made once a call from the numbers that Python passes, in their order;
//             with flags among them, usual() and assume_usual() too
//   eval      the loss of an element, and its derivative by each of the inputs
//   early     optional: a number that takes many steps, an exponential or a logarithm, and that
//             eval is given then. A loop may compute it of many elements before eval of the first
//
// A third tensor that is absent is 1 everywhere.
#include "core/math.h"
#include "core/math64.h"

namespace mbk::MBK_ISA {

template <class T>
struct NoParameters {
  MBK_FN explicit NoParameters(const double*) {}
};

// Whether a loss has flags among its parameters. Its Call then has usual(), whether they are as in
// most calls, and assume_usual(), which makes them constants for the compiler.
template <class Call>
constexpr auto has_flags(int) -> decltype(((const Call*)nullptr)->usual()) {
  return true;
}
template <class Call>
constexpr bool has_flags(...) {
  return false;
}
template <class Call>
inline constexpr bool kHasFlags = has_flags<Call>(0);

template <class Loss>
constexpr auto has_early(int) -> decltype((void)&Loss::template early<float>, true) {
  return true;
}
template <class Loss>
constexpr bool has_early(...) {
  return false;
}
template <class Loss>
inline constexpr bool kHasEarly = has_early<Loss>(0);
template <class Loss, class V>
MBK_FN void evaluate(const typename Loss::template Call<Element<V>>& call,
                     const V (&x)[Loss::kInputs], V& loss, V (&d)[Loss::kInputs]) {
  if constexpr (kHasEarly<Loss>) {
    Loss::eval(call, x, Loss::early(call, x), loss, d);
  } else {
    Loss::eval(call, x, loss, d);
  }
}

// max(0, x); unit_step(x) is the subgradient of torch's clamp_min. NaN stays NaN.
template <class V>
MBK_FN V hinge(V x) {
  return max(V{}, x);
}

// x, but -limit below that and limit above. NaN stays NaN. limit > 0.
template <class V>
MBK_FN V clamp(V x, V limit) {
  return max(-limit, min(limit, x));
}

// a * b + c where one rounding or two make no difference: a b is exact, or c is 0 and a b is not
// negative. One operation for vectors; a single lane may have to put a fused one together.
template <class V>
MBK_FN V add_exact(V a, V b, V c) {
  if constexpr (lanes<V> == 1) {
    return a * b + c;
  } else {
    return multiply_add(a, b, c);
  }
}

// log(1 + e^x), log(1 + e^-x), 1 / (1 + e^-x), 1 / (1 + e^x) with one exponential, e^-|x|.
template <class V>
struct Logistic {
  V softplus, softplus_of_minus, sigmoid, sigmoid_of_minus;
};
template <class V>
MBK_FN Logistic<V> logistic(V x, V exp_of_minus_abs) {
  const V zero = V{}, one = splat<V>(1);
  V e = exp_of_minus_abs;
  if constexpr (!kScales<V>) e = e + select(x == x, zero, x);  // NaN where x is
  const V tail = log1p_of_exp(e), near = one / (one + e), far = e * near;
  const auto negative = x < zero;
  return {max(x, zero) + tail, max(-x, zero) + tail, select(negative, far, near),
          select(negative, near, far)};
}

}  // namespace mbk::MBK_ISA
