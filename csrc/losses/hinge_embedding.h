#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Targets x1 = +-1: x0 where x1 = 1, max(0, margin - x0) where x1 = -1; the sum of both elsewhere,
// as in torch, and so is the slope 1 at the kink. No derivative by x1.
struct HingeEmbedding {
  static constexpr const char* name = "hinge_embedding_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    T margin;
    MBK_FN explicit Call(const double* p) : margin((T)p[0]) {}
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V zero = V{}, one = splat<V>(1), r = splat<V>(call.margin) - x[0];
    const auto far = x[1] != one, near = x[1] != -one;
    loss = select(far, hinge(r), zero) + select(near, x[0], zero);
    d[0] = select(near, one, zero) - select(far, unit_step(r), zero);
    d[1] = zero;
  }
};

}  // namespace mbk::MBK_ISA
