#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// With r = x0 - x1: r^2 / (2 beta) where |r| < beta, else |r| - beta / 2. beta > 0.
struct SmoothL1 {
  static constexpr const char* name = "smooth_l1_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    T beta, half_beta, inverse, half_inverse;
    MBK_FN explicit Call(const double* p)
        : beta((T)p[0]),
          half_beta((T)(0.5 * p[0])),
          inverse((T)(1 / p[0])),
          half_inverse((T)(0.5 / p[0])) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1], beta = splat<V>(call.beta), one = splat<V>(1);
    loss = select(abs(r) < beta, r * r * call.half_inverse, abs(r) - call.half_beta);
    d[0] = select(r <= -beta, -one, select(r >= beta, one, r * call.inverse));
    d[1] = -d[0];
  }
};

}  // namespace mbk::MBK_ISA
