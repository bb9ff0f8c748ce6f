#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Means x0, targets x1, variances x2: (log v + (x0 - x1)^2 / v) / 2, v = max(x2, eps), to which
// log(2 pi) / 2 is added with `full`. As in torch the derivative by x2 is that by v everywhere.
// Parameters: full, eps.
struct GaussianNll {
  static constexpr const char* name = "gaussian_nll_loss";
  static constexpr int kInputs = 3;
  template <class T>
  struct Call {
    T constant, eps;
    MBK_FN explicit Call(const double* p)
        : constant((T)(p[0] != 0 ? 0.91893853320467274178 : 0)), eps((T)p[1]) {}
  };
  template <class V>
  MBK_FN static V early(const Call<Element<V>>& call, const V (&x)[kInputs]) {
    return log(max(splat<V>(call.eps), x[2]));
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V log_v, V& loss,
                          V (&d)[kInputs]) {
    const V v = max(splat<V>(call.eps), x[2]), r = x[0] - x[1], half = splat<V>((Element<V>)0.5);
    const V slope = r / v;
    loss = multiply_add(half, log_v + r * r / v, splat<V>(call.constant));
    d[0] = slope;
    d[1] = -slope;
    d[2] = half * (multiply_add(-r, slope, splat<V>(1)) / v);
  }
};

}  // namespace mbk::MBK_ISA
