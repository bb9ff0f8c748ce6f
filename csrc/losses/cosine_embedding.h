#pragma once
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// cos = x.y / sqrt(A B), A = |x|^2 + eps, B = |y|^2 + eps, with torch's eps (ATen/native/Loss.cpp).
//   label 1: 1 - cos;  label -1: max(0, cos - margin);  else 0
//   dcos/dx = y / sqrt(A B) - x cos / A
// In fp64: both 1 - cos and its gradient are small differences where x and y are nearly parallel.
struct CosineEmbeddingLoss : MultirowLoss {
  static constexpr const char* name = "cosine_embedding_loss";
  static constexpr ItemTarget kTarget = ItemTarget::number;
  static constexpr int kInputs = 2, kGradients = 2, kSums = 3;
  static constexpr bool kWide = true;
  static constexpr double kEpsilon = 1e-12;
  enum { kOther, kOwnX, kOwnY };
  struct Angle {
    double a, b, norm, difference, cosine;
  };
  MBK_FN static Angle angle(const MultirowItem& item) {
    Angle r;
    r.a = item.first[1] + kEpsilon, r.b = item.first[2] + kEpsilon;
    r.norm = sqrt(r.a * r.b);
    r.cosine = item.first[0] / r.norm;
    r.difference = (r.norm - item.first[0]) / r.norm;
    return r;
  }
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    const Angle r = angle(item);
    if (item.label == 1) return r.difference;
    const double over = r.cosine - a.parameters[0];
    return item.label == -1 ? over < 0 ? 0 : over : 0;
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    const Angle r = angle(item);
    double f = item.label == 1 ? -item.scale : 0;
    if (item.label == -1 && !(r.cosine - a.parameters[0] < 0)) f = item.scale;
    c.value[kOther] = f == 0 ? 0 : f / r.norm;
    c.value[kOwnX] = f == 0 ? 0 : -(f * (r.cosine / r.a));
    c.value[kOwnY] = f == 0 ? 0 : -(f * (r.cosine / r.b));
    return 0;
  }
  template <class V>
  MBK_FN static void sums1(const Constants&, const V* x, V, const V*, V* term) {
    term[0] = x[0] * x[1];
    term[1] = x[0] * x[0];
    term[2] = x[1] * x[1];
  }
  template <class V>
  MBK_FN static void gradient(const Constants& c, const V* x, V, const V*, V* g) {
    g[0] = x[1] * c.get<V>(kOther) + x[0] * c.get<V>(kOwnX);
    g[1] = x[0] * c.get<V>(kOther) + x[1] * c.get<V>(kOwnY);
  }
};

}  // namespace mbk::MBK_ISA
