#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Logits x0, targets x1, weights x2 of the positive class: x2 x1 log(1 + e^-x0) +
// (1 - x1) log(1 + e^x0), without cancellation for targets in [0, 1]. No derivative by x2.
struct BinaryCrossEntropyWithLogits {
  static constexpr const char* name = "binary_cross_entropy_with_logits";
  static constexpr int kInputs = 3;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static V early(const Call<Element<V>>&, const V (&x)[kInputs]) {
    return exp_of_minus_abs(x[0]);
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V e, V& loss,
                          V (&d)[kInputs]) {
    const Logistic<V> l = logistic(x[0], e);
    const V yes = x[2] * x[1], no = splat<V>(1) - x[1];
    loss = multiply_add(yes, l.softplus_of_minus, no * l.softplus);
    d[0] = multiply_add(no, l.sigmoid, -(yes * l.sigmoid_of_minus));
    // x2 log(1 + e^-x0) - log(1 + e^x0); both are log(1 + e^-|x0|), one with |x0| more.
    const V more = x[2] - splat<V>(1), zero = V{};  // most often 0, and then so is the product
    const auto below = x[0] < zero;
    const V tail = select(below, l.softplus, l.softplus_of_minus);
    d[1] = select(more == zero, zero, more * tail) - select(below, x[2] * x[0], x[0]);
    d[2] = V{};
  }
};

}  // namespace mbk::MBK_ISA
