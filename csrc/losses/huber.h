#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// With r = x0 - x1: r^2 / 2 where |r| < delta, else delta (|r| - delta / 2).
struct Huber {
  static constexpr const char* name = "huber_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    T delta, half_delta;
    MBK_FN explicit Call(const double* p) : delta((T)p[0]), half_delta((T)(0.5 * p[0])) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1], delta = splat<V>(call.delta);
    loss = select(abs(r) < delta, r * r * (Element<V>)0.5, (abs(r) - call.half_delta) * delta);
    d[0] = select(r <= -delta, -delta, select(r >= delta, delta, r));
    d[1] = -d[0];
  }
};

}  // namespace mbk::MBK_ISA
