#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Log-probabilities x0 against probabilities x1: x1 (log x1 - x0), where 0 log 0 = 0; or against
// log-probabilities x1: e^x1 (x1 - x0). Parameter: whether x1 is logarithmic.
struct KLDivergence {
  static constexpr const char* name = "kl_div";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    bool log_target;
    MBK_FN explicit Call(const double* p) : log_target(p[0] != 0) {}
    MBK_FN bool usual() const { return !log_target; }
    MBK_FN void assume_usual() { log_target = false; }
  };
  template <class V>
  MBK_FN static V early(const Call<Element<V>>& call, const V (&x)[kInputs]) {
    return call.log_target ? exp(x[1]) : log(x[1]);
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V early, V& loss,
                          V (&d)[kInputs]) {
    if (call.log_target) {
      const V p = early, r = x[1] - x[0];
      loss = p * r;
      d[0] = -p;
      d[1] = multiply_add(p, r, p);
    } else {
      const V logarithm = early, zero = V{};
      loss = x[1] * (select(x[1] == zero, zero, logarithm) - x[0]);
      d[0] = -x[1];
      d[1] = (logarithm - x[0]) + splat<V>(1);
    }
  }
};

}  // namespace mbk::MBK_ISA
