#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Targets x1 against log-rates x0: e^x0 - x1 x0; or against rates x0: x0 - x1 log(x0 + eps). With
// `full`, Stirling's x1 log x1 - x1 + log(2 pi x1) / 2 is added where x1 > 1. Parameters: whether
// x0 is logarithmic, full, eps.
struct PoissonNll {
  static constexpr const char* name = "poisson_nll_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    bool log_input, full;
    T eps, half_log_2pi;
    MBK_FN explicit Call(const double* p)
        : log_input(p[0] != 0),
          full(p[1] != 0),
          eps((T)p[2]),
          half_log_2pi((T)0.91893853320467274178) {}
    MBK_FN bool usual() const { return log_input && !full; }
    MBK_FN void assume_usual() { log_input = true, full = false; }
  };
  template <class V>
  MBK_FN static V early(const Call<Element<V>>& call, const V (&x)[kInputs]) {
    return call.log_input ? exp(x[0]) : log(x[0] + call.eps);
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V early, V& loss,
                          V (&d)[kInputs]) {
    const V one = splat<V>(1), zero = V{};
    if (call.log_input) {
      const V rate = early;
      loss = multiply_add(-x[1], x[0], rate);
      d[0] = rate - x[1];
      d[1] = -x[0];
    } else {
      const V rate = x[0] + call.eps, logarithm = early;
      loss = multiply_add(-x[1], logarithm, x[0]);
      d[0] = one - x[1] / rate;
      d[1] = -logarithm;
    }
    if (call.full) {
      const V logarithm = log(x[1]), half = splat<V>((Element<V>)0.5);
      const auto counts = x[1] > one;
      const V stirling = multiply_add(x[1] + half, logarithm, splat<V>(call.half_log_2pi) - x[1]);
      loss = loss + select(counts, stirling, zero);
      d[1] = d[1] + select(counts, logarithm + half / x[1], zero);
    }
  }
};

}  // namespace mbk::MBK_ISA
