#pragma once
#include "core/math.h"
#include "core/math64.h"
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// loss = -w_t (1 - p_t)^gamma log p_t with p = softmax(s x). As in cross-entropy the term of t is
// kept out of the sum R of the others: 1 - p_t = q = R / S without cancellation, S = R + e_t.
//   dloss/dx_j = s A p_j for j other than t, -s A q for t,
//   A = w_t q^gamma (1 + gamma p_t (-log p_t) / q), where (-log p_t) / q is 1 for q = 0
struct SoftmaxFocalLoss : MultirowLoss {
  static constexpr const char* name = "softmax_focal_loss";
  static constexpr ItemTarget kTarget = ItemTarget::index;
  static constexpr bool kApart = true, kWeighsDivisor = true;
  static constexpr int kMaxima = 1, kKept = 1, kScaleParameter = 1, kConstants = 3;
  enum { kMax, kScale, kFactor };           // of the columns
  enum { kRest, kSum, kMinusLog, kPower };  // R, S, -log p_t, q^gamma
  MBK_FN static void finish(const MultirowArgs& a, MultirowItem& item) {
    const double rest = item.first[0], gamma = a.parameters[0];
    const double excess = item.target_term == 1 ? rest : (rest - 1) + item.target_term;
    item.own[kRest] = rest, item.own[kSum] = rest + item.target_term;
    item.own[kMinusLog] = (item.max[0] - item.target_logit) * a.parameters[1] + log1p(excess);
    const double q = rest / item.own[kSum];
    item.own[kPower] = gamma == 0 ? 1 : gamma == 1 ? q : gamma == 2 ? q * q : exp(gamma * log(q));
  }
  MBK_FN static void begin(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kMax] = item.max[0];
    c.value[kScale] = a.parameters[1];
  }
  MBK_FN static double loss(const MultirowArgs&, const MultirowItem& item) {
    return item.target_weight * (item.own[kPower] * item.own[kMinusLog]);
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    const double rest = item.own[kRest], sum = item.own[kSum], gamma = a.parameters[0];
    double pull = item.own[kPower];
    if (gamma != 0 && item.target_term != 0) {  // p_t log p_t is 0 where p_t is
      const double ratio = rest > 0 ? item.own[kMinusLog] * sum / rest : 1;
      pull = pull * (1 + gamma * (item.target_term / sum) * ratio);
    }
    c.value[kFactor] = item.target_weight * pull * a.parameters[1] * (item.scale / sum);
    return -(c.value[kFactor] * rest);
  }
  template <class V, class C>
  MBK_FN static void keep(const C& c, const V* x, V* kept) {
    kept[0] = exp_nonpositive((x[0] - constant<V>(c, kMax)) * constant<V>(c, kScale));
  }
  template <class V, class C>
  MBK_FN static void sums1(const C&, const V*, V, const V* kept, V* term) {
    term[0] = kept[0];
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V*, V, const V* kept, V* g) {
    g[0] = kept[0] * constant<V>(c, kFactor);
  }
};

}  // namespace mbk::MBK_ISA
