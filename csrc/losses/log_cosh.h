#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// loss = log cosh r, r = x0 - x1; its derivative is tanh r.
struct LogCosh {
  static constexpr const char* name = "log_cosh_loss";
  static constexpr int kInputs = 2;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static V early(const Call<Element<V>>&, const V (&x)[kInputs]) {
    return log_cosh_exp(x[0] - x[1]);
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V e, V& loss,
                          V (&d)[kInputs]) {
    const LogCoshOf<V> of = log_cosh(x[0] - x[1], e);
    loss = of.value;
    d[0] = of.slope;
    d[1] = -of.slope;
  }
};

}  // namespace mbk::MBK_ISA
