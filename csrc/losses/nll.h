#pragma once
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// loss = -w_t x_t of log-probabilities x; dloss/dx is -w_t at t, else 0. No column but t is read.
struct NllLoss : MultirowLoss {
  static constexpr const char* name = "nll_loss";
  static constexpr ItemTarget kTarget = ItemTarget::index;
  static constexpr bool kWeighsDivisor = true, kApart = true;
  static constexpr int kLevels = 0;
  MBK_FN static double loss(const MultirowArgs&, const MultirowItem& item) {
    return -(item.target_weight * item.target_logit);
  }
  MBK_FN static double factors(const MultirowArgs&, const MultirowItem& item, Constants&) {
    return -(item.target_weight * item.scale);
  }
  template <class V, class C>
  MBK_FN static void sums1(const C&, const V*, V, const V*, V*) {}
  template <class V, class C>
  MBK_FN static void gradient(const C&, const V*, V, const V*, V* g) {
    g[0] = V{};
  }
};

}  // namespace mbk::MBK_ISA
