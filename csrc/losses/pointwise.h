#pragma once
// What element-wise losses are made of. A loss has
//
//   name      its name in mbkern.functional
//   kInputs   2 or 3: input, target and a third tensor, x[0], x[1], x[2] below
//   Call<T>   its parameters, made once a call from the numbers that Python passes, in their order;
//             with flags among them, usual() and assume_usual() too (cpu/pointwise_step.h)
//   eval      the loss of an element, and its derivative by each of the inputs
//
// A third tensor that is absent is 1 everywhere.
#include "core/math.h"
#include "core/math64.h"

namespace mbk::MBK_ISA {

template <class T>
struct NoParameters {
  MBK_FN explicit NoParameters(const double*) {}
};

// 1, -1, and 0 for 0 and NaN, as in torch.
template <class V>
MBK_FN V sign(V x) {
  const V zero = V{}, one = splat<V>(1);
  return select(x > zero, one, select(x < zero, -one, zero));
}

// max(0, x), and 1 where x >= 0, else 0: the subgradient of torch's clamp_min. NaN stays NaN.
template <class V>
MBK_FN V hinge(V x) {
  return max(V{}, x);
}
template <class V>
MBK_FN V hinge_slope(V x) {
  return select(x >= V{}, splat<V>(1), V{});
}

// log(1 + e^x), log(1 + e^-x), 1 / (1 + e^-x), 1 / (1 + e^x) with one exponential, e^-|x|.
template <class V>
struct Logistic {
  V softplus, softplus_of_minus, sigmoid, sigmoid_of_minus;
};
template <class V>
MBK_FN Logistic<V> logistic(V x) {
  const V zero = V{}, one = splat<V>(1);
  V e = exp_of_minus_abs(x);
  if constexpr (!kScales<V>) e = e + select(x == x, zero, x);  // NaN where x is
  const V tail = log1p_of_exp(e), near = one / (one + e), far = e * near;
  const auto negative = x < zero;
  return {max(x, zero) + tail, max(-x, zero) + tail, select(negative, far, near),
          select(negative, near, far)};
}

}  // namespace mbk::MBK_ISA
