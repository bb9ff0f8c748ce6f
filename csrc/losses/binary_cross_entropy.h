#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// Probabilities x0, targets x1: -x1 max(log x0, -100) - (1 - x1) max(log(1 - x0), -100). NaN where
// x0 or x1 is not in [0, 1], by which the caller knows. Derivative (x0 - x1) / max(x0 (1 - x0),
// 1e-12), with torch's 1e-12, which is an fp32 number.
struct BinaryCrossEntropy {
  static constexpr const char* name = "binary_cross_entropy";
  static constexpr int kInputs = 2;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static V early(const Call<Element<V>>&, const V (&x)[kInputs]) {
    return max(splat<V>(-100), log(x[0]));
  }
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V yes, V& loss,
                          V (&d)[kInputs]) {
    const V one = splat<V>(1), rest = one - x[1];
    const V no = max(splat<V>(-100), log1p(-x[0]));
    const V nan = quiet_nan<V>(), zero = V{};
    const V outside = select(x[1] >= zero, select(rest >= zero, zero, nan), nan);
    loss = outside - multiply_add(x[1], yes, rest * no);
    d[0] = (x[0] - x[1]) / max(splat<V>((Element<V>)1e-12f), x[0] * (one - x[0]));
    d[1] = no - yes;
  }
};

}  // namespace mbk::MBK_ISA
