#pragma once
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// loss = max(0, margin + d(a, p) - n), n = d(a, n) or, with swap, the smaller of it and d(p, n);
// d(x, y) = |x - y + eps|_2, whose gradient at 0 is 0. Where both are as small, each has half of
// the gradient. In fp64, where adding eps = 1e-6 to a difference rounds to less than its share.
struct TripletMarginLoss : MultirowLoss {
  static constexpr const char* name = "triplet_margin_loss";
  static constexpr int kInputs = 3, kGradients = 3, kSums = 3;
  static constexpr bool kWide = true;
  enum { kEpsilon, kPositive, kNegative, kSwapped };
  struct Distances {
    double positive, negative, swapped, value;
    bool swap;
  };
  MBK_FN static Distances distances(const MultirowArgs& a, const MultirowItem& item) {
    Distances d;
    d.positive = sqrt(item.first[0]), d.negative = sqrt(item.first[1]);
    d.swapped = sqrt(item.first[2]);
    d.swap = a.parameters[2] != 0;
    double far = d.negative;
    if (d.swap && !(d.swapped > far)) far = d.swapped;  // a NaN of either stays
    if (d.swap && d.negative != d.negative) far = d.negative;
    d.value = (a.parameters[0] + d.positive) - far;
    return d;
  }
  MBK_FN static double over(double scale, double distance) {
    return distance == 0 ? 0 : scale / distance;
  }
  MBK_FN static void begin(const MultirowArgs& a, const MultirowItem&, Constants& c) {
    c.value[kEpsilon] = a.parameters[1];
  }
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    const double value = distances(a, item).value;
    return value < 0 ? 0 : value;
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    const Distances d = distances(a, item);
    double negative = 1, swapped = 0;
    if (d.swap && d.negative > d.swapped) negative = 0, swapped = 1;
    if (d.swap && d.negative == d.swapped) negative = swapped = 0.5;
    const double scale = d.value < 0 ? 0 : item.scale;
    c.value[kPositive] = over(scale, d.positive);
    c.value[kNegative] = over(scale * negative, d.negative);
    c.value[kSwapped] = over(scale * swapped, d.swapped);
    return 0;
  }
  template <class V>
  MBK_FN static void sums1(const Constants& c, const V* x, V, const V*, V* term) {
    const V eps = c.get<V>(kEpsilon);
    const V positive = (x[0] - x[1]) + eps, negative = (x[0] - x[2]) + eps;
    const V swapped = (x[1] - x[2]) + eps;
    term[0] = positive * positive;
    term[1] = negative * negative;
    term[2] = swapped * swapped;
  }
  template <class V>
  MBK_FN static void gradient(const Constants& c, const V* x, V, const V*, V* g) {
    const V eps = c.get<V>(kEpsilon);
    const V positive = ((x[0] - x[1]) + eps) * c.get<V>(kPositive);
    const V negative = ((x[0] - x[2]) + eps) * c.get<V>(kNegative);
    const V swapped = ((x[1] - x[2]) + eps) * c.get<V>(kSwapped);
    g[0] = positive - negative;
    g[1] = -positive - swapped;
    g[2] = negative + swapped;
  }
};

}  // namespace mbk::MBK_ISA
