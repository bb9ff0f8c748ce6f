#pragma once
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// loss = 1 - (2 sum p t + s) / (sum p + sum t + s) = D / U, with
//   D = sum p (1 - t) + t (1 - p), no term of which is negative for p and t in [0, 1],
//   U = sum (p + t) + s;   dloss/dp = (O - 2 t) / U, and the same for t, with
//   O = (2 sum p t + s) / U, which is 1 - loss, but with all digits where they hardly overlap;
//   there the loss is 1 - O, as D's own last places are more than O's.
struct DiceLoss : MultirowLoss {
  static constexpr const char* name = "dice_loss";
  static constexpr int kInputs = 2, kGradients = 2, kSums = 3, kConstants = 2;
  enum { kOverlap, kFactor };  // O, 1 / U
  MBK_FN static void finish(const MultirowArgs& a, MultirowItem& item) {
    item.own[0] = item.first[1] + a.parameters[0];
    item.own[2] = (2 * item.first[2] + a.parameters[0]) / item.own[0];
    item.own[1] = item.own[2] < 0.5 ? 1 - item.own[2] : item.first[0] / item.own[0];
  }
  MBK_FN static double loss(const MultirowArgs&, const MultirowItem& item) { return item.own[1]; }
  MBK_FN static double factors(const MultirowArgs&, const MultirowItem& item, Constants& c) {
    c.value[kOverlap] = item.own[2];
    c.value[kFactor] = item.scale / item.own[0];
    return 0;
  }
  template <class V, class C>
  MBK_FN static void sums1(const C&, const V* x, V, const V*, V* term) {
    const V one = splat<V>(1);
    term[0] = multiply_add(x[0], one - x[1], x[1] * (one - x[0]));
    term[1] = x[0] + x[1];
    term[2] = x[0] * x[1];
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V* x, V, const V*, V* g) {
    const V overlap = constant<V>(c, kOverlap), f = constant<V>(c, kFactor);
    g[0] = (overlap - (x[1] + x[1])) * f;
    g[1] = (overlap - (x[0] + x[0])) * f;
  }
};

}  // namespace mbk::MBK_ISA
