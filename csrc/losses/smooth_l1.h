#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// With r = x0 - x1: r^2 / (2 beta) where |r| < beta, else |r| - beta / 2. With the slope s, which
// is r / beta between -1 and 1, both are s (r - beta s / 2); of a relative error of s only the
// square gets into that. beta > 0. One whose inverse is no number counts as the smallest normal
// one; one that is infinite in T has the slope 0, as in torch, but for infinite r, where all is
// NaN.
struct SmoothL1 {
  static constexpr const char* name = "smooth_l1_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    T half_beta = 0, inverse = 0;
    MBK_FN explicit Call(const double* p) {
      constexpr double kLeast = sizeof(T) == 4 ? __FLT_MIN__ : __DBL_MIN__;
      constexpr double kMost = sizeof(T) == 4 ? __FLT_MAX__ : __DBL_MAX__;
      const double beta = p[0] > kLeast ? p[0] : kLeast;
      if (beta / 2 <= kMost) half_beta = (T)(beta / 2), inverse = (T)(1 / beta);
    }
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
