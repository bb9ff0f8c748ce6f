// The row losses for every storage type. Compiled once per ISA.
#include "core/backend.h"
#include "cpu/long_rows.h"
#include "cpu/short_rows.h"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

template <class Loss, class In, class Out, bool kAccumulate>
void run(const RowArgs& a) {
  if (lanes_across_items(a)) {
    short_rows<Loss, In, Out, kAccumulate>(a);
  } else {
    long_rows<Loss, In, Out, kAccumulate>(a);
  }
}

template <class Family, class In>
void row(const RowArgs& a) {
  Family::visit(a, [&a](auto loss) {
    typedef decltype(loss) Loss;
    if (a.accumulate) {
      run<Loss, In, Compute<In>, true>(a);
    } else {
      run<Loss, In, In, false>(a);
    }
  });
}

template <class... Family>
RowFn find(LossList<Family...>, int loss, DType input) {
  static constexpr RowFn functions[][kDTypes] = {
      {&row<Family, float>, &row<Family, bf16>, &row<Family, f16>, &row<Family, double>}...};
  return functions[loss][(int)input];
}

}  // namespace

RowFn row_function(int loss, DType input) { return find(RowLosses{}, loss, input); }

}  // namespace mbk::MBK_ISA
