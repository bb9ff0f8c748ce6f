#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// With r = x0 - x1: r^2 / (2 beta) where |r| < beta, else |r| - beta / 2. With the slope s, which
// is r / beta between -1 and 1, both are s (r - beta s / 2); of a relative error of s only the
// square gets into that. beta > 0, perhaps infinite: then s is 0, and so must be beta s.
struct SmoothL1 {
  static constexpr const char* name = "smooth_l1_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    static constexpr T kMost = sizeof(T) == 4 ? (T)__FLT_MAX__ : (T)__DBL_MAX__;
    T half_beta, inverse;
    MBK_FN explicit Call(const double* p)
        : half_beta(min((T)(0.5 * p[0]), kMost)), inverse((T)(1 / p[0])) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1], slope = clamp(r * call.inverse, splat<V>(1));
    loss = add_exact(slope, r - call.half_beta * slope, V{});  // 0, not -0
    d[0] = slope;
    d[1] = -slope;
  }
};

}  // namespace mbk::MBK_ISA
