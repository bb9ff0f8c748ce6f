#pragma once
#include "core/math.h"
#include "core/math64.h"
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// loss = -1/C sum_j w_j (y log sigmoid(x) + (1 - y) log sigmoid(-x)), where
//   -log sigmoid(x) = softplus(-x) = max(-x, 0) + l,  l = softplus(-|x|):
// no term of l + y max(-x, 0) + (1 - y) max(x, 0) is negative for y in [0, 1]. The gradient,
// sigmoid(x) - y = (1 - y) sigmoid(x) - y sigmoid(-x), does not cancel where y is 0 or 1.
struct MultilabelSoftMarginLoss : MultirowLoss {
  static constexpr const char* name = "multilabel_soft_margin_loss";
  static constexpr int kInputs = 2, kGradients = 2, kFusedLevel = 1, kConstants = 1;
  static constexpr bool kColumnWeights = true;
  enum { kFactor };
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    return item.first[0] / (double)a.columns;
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kFactor] = item.scale / (double)a.columns;
    return 0;
  }
  template <class V, class C>
  MBK_FN static void sums1(const C&, const V* x, V w, const V*, V* term) {
    const V zero = V{}, l = softplus(-abs(x[0]));
    const V up = select(x[0] > zero, x[0], zero), down = select(x[0] < zero, -x[0], zero);
    term[0] = w * (l + multiply_add(x[1], down, (splat<V>(1) - x[1]) * up));
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V* x, V w, const V*, V* g) {
    const V f = w * constant<V>(c, kFactor), one = splat<V>(1);
    const V less = sigmoid(-abs(x[0])), more = one - less;
    const auto negative = x[0] < V{};
    const V here = select(negative, less, more), there = select(negative, more, less);
    g[0] = ((one - x[1]) * here - x[1] * there) * f;
    g[1] = -x[0] * f;
  }
};

}  // namespace mbk::MBK_ISA
