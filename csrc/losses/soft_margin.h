#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Targets x1 = +-1: log(1 + e^(-x1 x0)). No derivative by x1.
struct SoftMargin {
  static constexpr const char* name = "soft_margin_loss";
  static constexpr int kInputs = 2;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static V early(const Call<Element<V>>&, const V (&x)[kInputs]) {
    return exp_of_minus_abs(x[1] * x[0]);
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V e, V& loss,
                          V (&d)[kInputs]) {
    const Logistic<V> l = logistic(x[1] * x[0], e);
    loss = l.softplus_of_minus;
    d[0] = -(x[1] * l.sigmoid_of_minus);
    d[1] = V{};
  }
};

}  // namespace mbk::MBK_ISA
