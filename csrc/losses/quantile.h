#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Pinball loss of the quantile q: with r = x1 - x0, q r where r >= 0, else (q - 1) r; 0 is the
// derivative at 0.
struct Quantile {
  static constexpr const char* name = "quantile_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    T q, rest;
    MBK_FN explicit Call(const double* p) : q((T)p[0]), rest((T)(p[0] - 1)) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[1] - x[0], zero = V{}, q = splat<V>(call.q), rest = splat<V>(call.rest);
    const V side = select(r < zero, rest, q), slope = abs(sign(r)) * side;
    loss = r * side;
    d[0] = -slope;
    d[1] = slope;
  }
};

}  // namespace mbk::MBK_ISA
