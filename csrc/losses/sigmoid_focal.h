#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Focal loss (Lin et al. 2017) of logits x0 and targets x1 in [0, 1], with s = 1 / (1 + e^-x0):
//   a q^gamma ce,  q = s (1 - x1) + (1 - s) x1,  ce = x1 log(1 + e^-x0) + (1 - x1) log(1 + e^x0),
//   a = alpha x1 + (1 - alpha) (1 - x1), or 1 for alpha < 0.
// dq/dx0 = s (1 - s) (1 - 2 x1). Parameters: alpha, gamma.
struct SigmoidFocal {
  static constexpr const char* name = "sigmoid_focal_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    bool weighted;
    T alpha, rest, gamma;
    MBK_FN explicit Call(const double* p)
        : weighted(p[0] >= 0), alpha((T)p[0]), rest((T)(1 - p[0])), gamma((T)p[1]) {}
    MBK_FN bool usual() const { return weighted && gamma == 2; }
    MBK_FN void assume_usual() { weighted = true, gamma = 2; }
  };
  template <class V>
  MBK_FN static V early(const Call<Element<V>>&, const V (&x)[kInputs]) {
    return exp_of_minus_abs(x[0]);
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V e, V& loss,
                          V (&d)[kInputs]) {
    const Logistic<V> l = logistic(x[0], e);
    const V one = splat<V>(1), zero = V{}, y = x[1], no = one - y;
    const V ce = multiply_add(y, l.softplus_of_minus, no * l.softplus);
    const V dce = multiply_add(no, l.sigmoid, -(y * l.sigmoid_of_minus));
    const V q = multiply_add(l.sigmoid, no, l.sigmoid_of_minus * y);
    // q^gamma, and its derivative by q times ce; ce / q is a number where q^(gamma - 1) need not
    // be.
    V power, steeper;
    if (call.gamma == 2) {
      power = q * q, steeper = (q + q) * ce;
    } else if (call.gamma == 1) {
      power = q, steeper = ce;
    } else if (call.gamma == 0) {  // also where the cross-entropy is infinite
      power = one, steeper = zero;
    } else {
      power = select(q == zero, zero, exp(log(q) * call.gamma));
      steeper = (power * call.gamma) * select(q == zero, ce, ce / q);
    }
    const V a = call.weighted ? multiply_add(y, splat<V>(call.alpha), no * call.rest) : one;
    const V da = splat<V>(call.weighted ? call.alpha - call.rest : 0);
    const V dq = l.sigmoid * l.sigmoid_of_minus * (no - y), dq_dy = l.sigmoid_of_minus - l.sigmoid;
    loss = a * (power * ce);
    d[0] = a * multiply_add(power, dce, steeper * dq);
    d[1] = multiply_add(da, power * ce, a * multiply_add(steeper, dq_dy, -(power * x[0])));
  }
};

}  // namespace mbk::MBK_ISA
