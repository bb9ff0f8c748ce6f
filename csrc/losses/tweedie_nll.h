#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Negative log-likelihood of a Tweedie distribution of power p, up to a constant, of targets x1
// against means m = x0, or m = e^x0:
//   -x1 m^(1-p) / (1-p) + m^(2-p) / (2-p); with p = 1, m - x1 log m; with p = 2, x1 / m + log m
// Jorgensen, The theory of dispersion models (1997). Parameters: p, whether x0 is logarithmic, eps,
// the least mean, below which the derivative by x0 is 0.
struct TweedieNll {
  static constexpr const char* name = "tweedie_nll_loss";
  static constexpr int kInputs = 2;
  template <class T>
  struct Call {
    bool is_normal, is_poisson, is_gamma, log_input;
    T one_minus_p, two_minus_p, first, second, eps;
    MBK_FN explicit Call(const double* p)
        : is_normal(p[0] == 0),
          is_poisson(p[0] == 1),
          is_gamma(p[0] == 2),
          log_input(p[1] != 0),
          one_minus_p((T)(1 - p[0])),
          two_minus_p((T)(2 - p[0])),
          first((T)(1 / (p[0] - 1))),
          second((T)(1 / (2 - p[0]))),
          eps((T)p[2]) {}
    MBK_FN bool usual() const { return !is_poisson && !is_gamma && log_input; }
    MBK_FN void assume_usual() { is_poisson = is_gamma = false, log_input = true; }
  };
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>& call, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V mean = max(splat<V>(call.eps), x[0]), one = splat<V>(1), zero = V{};
    const V logarithm = call.log_input ? x[0] : log(mean);
    V a, b;  // m^(1-p) and m^(2-p)
    if (call.log_input || !(call.is_normal || call.is_poisson || call.is_gamma)) {
      a = call.is_poisson ? one : exp(logarithm * call.one_minus_p);
      b = call.is_gamma ? one : exp(logarithm * call.two_minus_p);
    } else {
      a = call.is_normal ? mean : call.is_poisson ? one : one / mean;
      b = call.is_normal ? mean * mean : call.is_poisson ? mean : one;
    }
    const V first = call.is_poisson ? -logarithm : a * call.first;
    loss = multiply_add(x[1], first, call.is_gamma ? logarithm : b * call.second);
    V slope = multiply_add(-x[1], a, b);
    if (!call.log_input) {
      // a (m - x1), where the difference is exact, and a has all its digits.
      constexpr double kNormal = sizeof(Element<V>) == 4 ? 0x1p-126 : 0x1p-1022;
      const auto close = (x[1] >= mean * splat<V>((Element<V>)0.5)) & (x[1] <= mean + mean) &
                         (a >= splat<V>((Element<V>)kNormal));
      slope = select(close, a * (mean - x[1]), slope) / mean;
      slope = select(x[0] < splat<V>(call.eps), zero, slope);
    }
    d[0] = slope;
    d[1] = first;
  }
};

}  // namespace mbk::MBK_ISA
