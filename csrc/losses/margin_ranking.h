#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Targets x2 = +-1: max(0, -x2 (x0 - x1) + margin); at the kink the slope is 1, as in torch.
struct MarginRanking {
  static constexpr const char* name = "margin_ranking_loss";
  static constexpr int kInputs = 3;
  template <class T>
  struct Call {
    T margin;
    MBK_FN explicit Call(const double* p) : margin((T)p[0]) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1], value = multiply_add(-x[2], r, splat<V>(call.margin));
    const V slope = unit_step(value);
    loss = hinge(value);
    d[1] = x[2] * slope;
    d[0] = -d[1];
    d[2] = -(r * slope);
  }
};

}  // namespace mbk::MBK_ISA
