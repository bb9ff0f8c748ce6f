#pragma once
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// cos = x.y / sqrt(A B), A = |x|^2 + eps, B = |y|^2 + eps, with torch's eps (ATen/native/Loss.cpp).
//   label 1: 1 - cos;  label -1: max(0, cos - margin), at whose kink the slope is 1;  else 0
//   dcos/dx = y / sqrt(A B) - x cos / A
// In fp64: both 1 - cos and its gradient are small differences where x and y are nearly parallel.
struct CosineEmbeddingLoss : MultirowLoss {
  static constexpr const char* name = "cosine_embedding_loss";
  static constexpr ItemTarget kTarget = ItemTarget::number;
  static constexpr int kInputs = 2, kGradients = 2, kSums = 3, kConstants = 3;
  static constexpr bool kWide = true, kWideGradient = true;
  static constexpr double kEpsilon = 1e-12f;  // a float in torch
  enum { kOther, kOwnX, kOwnY };
  enum { kA, kB, kNorm, kDifference, kCosine };
  MBK_FN static void finish(const MultirowArgs&, MultirowItem& item) {
    item.own[kA] = item.first[1] + kEpsilon, item.own[kB] = item.first[2] + kEpsilon;
    const double norm = sqrt(item.own[kA] * item.own[kB]);
    item.own[kNorm] = norm;
    item.own[kCosine] = item.first[0] / norm;
    item.own[kDifference] = (norm - item.first[0]) / norm;
  }
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    if (item.label == 1) return item.own[kDifference];
    const double over = item.own[kCosine] - a.parameters[0];
    return item.label == -1 ? over < 0 ? 0 : over : 0;
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    double f = item.label == 1 ? -item.scale : 0;
    if (item.label == -1 && !(item.own[kCosine] - a.parameters[0] < 0)) f = item.scale;
    c.value[kOther] = f == 0 ? 0 : f / item.own[kNorm];
    c.value[kOwnX] = f == 0 ? 0 : -(f * (item.own[kCosine] / item.own[kA]));
    c.value[kOwnY] = f == 0 ? 0 : -(f * (item.own[kCosine] / item.own[kB]));
    return 0;
  }
  template <class V, class C>
  MBK_FN static void sums1(const C&, const V* x, V, const V*, V* term) {
    term[0] = x[0] * x[1];
    term[1] = x[0] * x[0];
    term[2] = x[1] * x[1];
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V* x, V, const V*, V* g) {
    g[0] = x[1] * constant<V>(c, kOther) + x[0] * constant<V>(c, kOwnX);
    g[1] = x[0] * constant<V>(c, kOther) + x[1] * constant<V>(c, kOwnY);
  }
};

}  // namespace mbk::MBK_ISA
