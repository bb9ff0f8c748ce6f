// The elementary functions over arrays, for the self-test and the exhaustive accuracy test.
// Compiled once per ISA. The caller sees to the default floating-point environment.
#include "core/backend.h"
#include "core/math64.h"

namespace mbk::MBK_ISA {
namespace {

// Full vectors, then the rest through a padded one, so that every element takes the vector code.
template <class F, class T>
void over_array(const T* x, T* y, int64_t n) {
  typedef Vector<T> V;
  V v;
  int64_t i = 0;
  for (; i + lanes<V> <= n; i += lanes<V>) {
    memcpy(&v, x + i, sizeof v);
    v = F::of(v);
    memcpy(y + i, &v, sizeof v);
  }
  if (i < n) {
    const size_t rest = (size_t)(n - i) * sizeof(T);
    v = V{};
    memcpy(&v, x + i, rest);
    v = F::of(v);
    memcpy(y + i, &v, rest);
  }
}

struct ExpNonpositive {
  template <class V>
  static MBK_FN V of(V x) {
    return exp_nonpositive(x);
  }
};
struct Exp {
  template <class V>
  static MBK_FN V of(V x) {
    return exp(x);
  }
};
struct Expm1 {
  template <class V>
  static MBK_FN V of(V x) {
    return expm1(x);
  }
};
struct Log {
  template <class V>
  static MBK_FN V of(V x) {
    return log(x);
  }
};
struct Log1p {
  template <class V>
  static MBK_FN V of(V x) {
    return log1p(x);
  }
};
struct Sigmoid {
  template <class V>
  static MBK_FN V of(V x) {
    return sigmoid(x);
  }
};
struct Softplus {
  template <class V>
  static MBK_FN V of(V x) {
    return softplus(x);
  }
};
struct Tanh {
  template <class V>
  static MBK_FN V of(V x) {
    return tanh(x);
  }
};

template <class F>
constexpr Elementary entry(const char* name) {
  return {name, over_array<F, float>, over_array<F, double>};
}

}  // namespace

extern const Elementary elementary_table[];
constexpr Elementary elementary_table[] = {
    entry<ExpNonpositive>("exp_nonpositive"),
    entry<Exp>("exp"),
    entry<Expm1>("expm1"),
    entry<Log>("log"),
    entry<Log1p>("log1p"),
    entry<Sigmoid>("sigmoid"),
    entry<Softplus>("softplus"),
    entry<Tanh>("tanh"),
    {nullptr, nullptr, nullptr},
};

}  // namespace mbk::MBK_ISA
