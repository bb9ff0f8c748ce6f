#pragma once
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {

// loss = r^2 / 2, r = x0 - x1.
struct HalfSquaredError {
  static constexpr const char* name = "half_squared_error";
  static constexpr int kInputs = 2;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1];
    loss = r * (Element<V>)0.5 * r;  // r^2 alone may be too large
    d[0] = r;
    d[1] = -r;
  }
};

// loss = r^2, r = x0 - x1.
struct SquaredError {
  static constexpr const char* name = "mse_loss";
  static constexpr int kInputs = 2;
  template <class T>
  using Call = NoParameters<T>;
  template <class V>
  MBK_FN static void eval(const Call<Element<V>>&, const V (&x)[kInputs], V& loss,
                          V (&d)[kInputs]) {
    const V r = x[0] - x[1];
    loss = r * r;
    d[0] = r + r;
    d[1] = -d[0];
  }
};

}  // namespace mbk::MBK_ISA
