#pragma once
// The elementary functions by name, for loops over arrays: the self-test, and the exhaustive test.
#include "core/math.h"
#include "core/math64.h"

namespace mbk::MBK_ISA {

struct ExpNonpositive {
  static constexpr const char* name = "exp_nonpositive";
  template <class V>
  MBK_FN static V of(V x) {
    return exp_nonpositive(x);
  }
};
struct Exp {
  static constexpr const char* name = "exp";
  template <class V>
  MBK_FN static V of(V x) {
    return exp(x);
  }
};
struct Expm1 {
  static constexpr const char* name = "expm1";
  template <class V>
  MBK_FN static V of(V x) {
    return expm1(x);
  }
};
struct Log {
  static constexpr const char* name = "log";
  template <class V>
  MBK_FN static V of(V x) {
    return log(x);
  }
};
struct Log1p {
  static constexpr const char* name = "log1p";
  template <class V>
  MBK_FN static V of(V x) {
    return log1p(x);
  }
};
struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  template <class V>
  MBK_FN static V of(V x) {
    return sigmoid(x);
  }
};
struct Softplus {
  static constexpr const char* name = "softplus";
  template <class V>
  MBK_FN static V of(V x) {
    return softplus(x);
  }
};
struct Tanh {
  static constexpr const char* name = "tanh";
  template <class V>
  MBK_FN static V of(V x) {
    return tanh(x);
  }
};

struct LogCoshValue {
  static constexpr const char* name = "log_cosh";
  template <class V>
  MBK_FN static V of(V x) {
    return canonical_nan(x, log_cosh(x, log_cosh_exp(x)).value);
  }
};
struct LogCoshSlope {
  static constexpr const char* name = "log_cosh_slope";
  template <class V>
  MBK_FN static V of(V x) {
    return canonical_nan(x, log_cosh(x, log_cosh_exp(x)).slope);
  }
};

template <class... F>
struct FunctionList {
  static constexpr int size = sizeof...(F);
};
using ElementaryFunctions = FunctionList<ExpNonpositive, Exp, Expm1, Log, Log1p, Sigmoid, Softplus,
                                         Tanh, LogCoshValue, LogCoshSlope>;

}  // namespace mbk::MBK_ISA
