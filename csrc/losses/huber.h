#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// With r = x0 - x1: r^2 / 2 where |r| < delta, else delta (|r| - delta / 2). With the slope s,
// which is r between -delta and delta, both are s (r - s / 2).
struct Huber {
  static constexpr const char* name = "huber_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    T delta;
    MBK_FN explicit Call(const double* p) : delta((T)p[0]) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1], slope = clamp(r, splat<V>(call.delta));
    // Exact but for denormal slopes, whose loss is 0 in any case.
    const V rest = add_exact(splat<V>((Element<V>)-0.5), slope, r);
    loss = add_exact(slope, rest, V{});  // 0, not -0
    d[0] = slope;
    d[1] = -slope;
  }
};

}  // namespace mbk::MBK_ISA
