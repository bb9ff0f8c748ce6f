#pragma once
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// loss = max(0, margin + d(a, p) - n), n = d(a, n) or, with swap, the smaller of it and d(p, n);
// d(x, y) = |x - y + eps|_2, whose gradient at 0 is 0; the slope of max at 0 is 1. Where both are
// as small, each has half of the gradient. Squares are added in fp64: the loss is a difference of
// distances.
struct TripletMarginLoss : MultirowLoss {
  static constexpr const char* name = "triplet_margin_loss";
  static constexpr int kInputs = 3, kGradients = 3, kSums = 3, kConstants = 4;
  static constexpr bool kWide = true;
  enum { kEpsilon, kPositive, kNegative, kSwapped };
  enum { kToPositive, kToNegative, kBetween, kValue };
  MBK_FN static void finish(const MultirowArgs& a, MultirowItem& item) {
    const double positive = sqrt(item.first[0]), negative = sqrt(item.first[1]);
    const double between = sqrt(item.first[2]);
    double far = negative;
    if (a.parameters[2] != 0 && !(between > negative)) far = between;
    if (negative != negative) far = negative;  // a NaN of either stays
    item.own[kToPositive] = positive, item.own[kToNegative] = negative;
    item.own[kBetween] = between;
    item.own[kValue] = (a.parameters[0] + positive) - far;
  }
  MBK_FN static double over(double scale, double distance) {
    return distance == 0 ? 0 : scale / distance;
  }
  MBK_FN static void begin(const MultirowArgs& a, const MultirowItem&, Constants& c) {
    c.value[kEpsilon] = a.parameters[1];
  }
  MBK_FN static double loss(const MultirowArgs&, const MultirowItem& item) {
    return item.own[kValue] < 0 ? 0 : item.own[kValue];
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    const double to_negative = item.own[kToNegative], between = item.own[kBetween];
    double negative = 1, swapped = 0;
    if (a.parameters[2] != 0 && to_negative > between) negative = 0, swapped = 1;
    if (a.parameters[2] != 0 && to_negative == between) negative = swapped = 0.5;
    const double scale = item.own[kValue] < 0 ? 0 : item.scale;
    c.value[kPositive] = over(scale, item.own[kToPositive]);
    c.value[kNegative] = over(scale * negative, to_negative);
    c.value[kSwapped] = over(scale * swapped, between);
    return 0;
  }
  template <class V, class C>
  MBK_FN static void sums1(const C& c, const V* x, V, const V*, V* term) {
    const V eps = constant<V>(c, kEpsilon);
    const V positive = (x[0] - x[1]) + eps, negative = (x[0] - x[2]) + eps;
    const V swapped = (x[1] - x[2]) + eps;
    term[0] = positive * positive;
    term[1] = negative * negative;
    term[2] = swapped * swapped;
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V* x, V, const V*, V* g) {
    const V eps = constant<V>(c, kEpsilon);
    const V positive = ((x[0] - x[1]) + eps) * constant<V>(c, kPositive);
    const V negative = ((x[0] - x[2]) + eps) * constant<V>(c, kNegative);
    // Where p and n are farther apart than numbers go, and it is not this distance that counts,
    // there is no gradient of it, rather than inf * 0.
    const V factor = constant<V>(c, kSwapped);
    V between = (x[1] - x[2]) + eps;
    between = select((factor == V{}) & (abs(between) == splat<V>(__builtin_inff())), V{}, between);
    const V swapped = between * factor;
    g[0] = positive - negative;
    g[1] = -positive - swapped;
    g[2] = negative + swapped;
  }
};

}  // namespace mbk::MBK_ISA
