#pragma once
#include "core/math.h"
#include "core/math64.h"
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// loss = w_t / C sum_{j != t} max(0, margin - x_t + x_j)^p, p = 1 or 2. Nothing is added where the
// distance is NaN, and the slope at the kink is 0, both as in torch.
struct MultiMarginLoss : MultirowLoss {
  static constexpr const char* name = "multi_margin_loss";
  static constexpr ItemTarget kTarget = ItemTarget::index;
  static constexpr bool kApart = true;
  static constexpr int kSums = 2, kFusedLevel = 1, kConstants = 3;
  enum { kOffset, kPower, kFactor };
  MBK_FN static double share(const MultirowArgs& a, const MultirowItem& item) {
    return item.target_weight / (double)a.columns;
  }
  MBK_FN static void begin(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kOffset] = a.parameters[1] - item.target_logit;
    c.value[kPower] = a.parameters[0];
  }
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    return share(a, item) * item.first[0];
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kFactor] = share(a, item) * item.scale * a.parameters[0];
    return -(c.value[kFactor] * item.first[1]);
  }
  template <class V, class C>
  MBK_FN static void sums1(const C& c, const V* x, V, const V*, V* term) {
    const V z = max(x[0] + constant<V>(c, kOffset), V{});
    const auto square = constant<V>(c, kPower) == splat<V>(2);
    term[0] = select(square, z * z, z);
    term[1] = select(z > V{}, select(square, z, splat<V>(1)), V{});
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V* x, V, const V*, V* g) {
    const V z = max(x[0] + constant<V>(c, kOffset), V{}), f = constant<V>(c, kFactor);
    const auto square = constant<V>(c, kPower) == splat<V>(2);
    g[0] = select(z > V{}, select(square, z * f, f), V{});
  }
};

// loss = 1 / C sum_y sum_j max(0, 1 - x_y + x_j) over the targets y, in their order, and all j that
// are no target; the slope at the kink is 0, as in torch. One level of sums for each y; kept[0] is
// 1 for a target, kept[1] the derivative so far, a whole number.
struct MultilabelMarginLoss : MultirowLoss {
  static constexpr const char* name = "multilabel_margin_loss";
  static constexpr ItemTarget kTarget = ItemTarget::list;
  static constexpr int kSums = 2, kKept = 2;
  enum { kOffset, kFactor };
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    return item.first[0] / (double)a.columns;
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kFactor] = item.scale / (double)a.columns;
    return 0;
  }
  template <class V, class C>
  MBK_FN static void sums1(const C& c, const V* x, V, const V* kept, V* term) {
    const V z = max(x[0] + constant<V>(c, kOffset), V{});
    const auto counts = kept[0] == V{};
    term[0] = select(counts, z, V{});
    term[1] = select(counts, select(z > V{}, splat<V>(1), V{}), V{});
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V*, V, const V* kept, V* g) {
    g[0] = select(kept[1] == V{}, V{}, kept[1] * constant<V>(c, kFactor));
  }
};

}  // namespace mbk::MBK_ISA
