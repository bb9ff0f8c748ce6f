// The elementary functions over arrays. Compiled once per ISA. The caller sees to the default
// floating-point environment.
#include "core/elementary.h"

#include "cpu/elementary_table.h"

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

template <class... F>
MBK_HOST_FN constexpr ElementaryTable table_of(FunctionList<F...>) {
  return {{{F::name, over_array<F, float>, over_array<F, double>}..., {nullptr, nullptr, nullptr}}};
}

}  // namespace

extern const ElementaryTable elementary_table;
constexpr ElementaryTable elementary_table = table_of(ElementaryFunctions{});

}  // namespace mbk::MBK_ISA
