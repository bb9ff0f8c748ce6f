#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Targets x1 = +-1: max(0, margin - x1 x0); at the kink the slope is 1.
struct Hinge {
  static constexpr const char* name = "hinge_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    T margin;
    MBK_FN explicit Call(const double* p) : margin((T)p[0]) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V value = multiply_add(-x[1], x[0], splat<V>(call.margin)), slope = unit_step(value);
    loss = hinge(value);
    d[0] = -(x[1] * slope);
    d[1] = -(x[0] * slope);
  }
};

}  // namespace mbk::MBK_ISA
