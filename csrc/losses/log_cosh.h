#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// loss = log cosh r, r = x0 - x1; its derivative is tanh r. As -log(1 - tanh^2 r) / 2 where
// |r| < 1, which does not cancel, and as |r| + log(1 + e^-2|r|) - log 2 elsewhere.
struct LogCosh {
  static constexpr const char* name = "log_cosh_loss";
  static constexpr int kInputs = 2;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1], t = tanh(r), a = abs(r);
    const V small = log1p(-(t * t)) * (Element<V>)-0.5;
    const V large =
        a + (log1p_of_exp(exp_of_minus_abs(a + a)) - (Element<V>)0.69314718055994530942);
    loss = select(a < splat<V>(1), small, large);
    d[0] = t;
    d[1] = -t;
  }
};

}  // namespace mbk::MBK_ISA
