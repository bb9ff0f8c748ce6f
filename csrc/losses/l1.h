#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// loss = |x0 - x1|; 0 is the derivative at 0.
struct AbsoluteError {
  static constexpr const char* name = "l1_loss";
  static constexpr int kInputs = 2;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1];
    loss = abs(r);
    d[0] = sign(r);
    d[1] = -d[0];
  }
};

}  // namespace mbk::MBK_ISA
