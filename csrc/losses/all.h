#pragma once
// Every loss, once. A loss's position in its list is its number in the tables and in the binding.
#include "losses/cosine_embedding.h"
#include "losses/cross_entropy.h"
#include "losses/dice.h"
#include "losses/margins.h"
#include "losses/multilabel_soft_margin.h"
#include "losses/nll.h"
#include "losses/softmax_distances.h"
#include "losses/softmax_focal.h"
#include "losses/squared_error.h"
#include "losses/triplet_margin.h"

namespace mbk::MBK_ISA {

template <class... L>
struct LossList {
  static constexpr int size = sizeof...(L);
};
using RowLosses = LossList<CrossEntropy>;
using MultirowLosses =
    LossList<NllLoss, MultiMarginLoss, MultilabelMarginLoss, MultilabelSoftMarginLoss,
             CosineEmbeddingLoss, TripletMarginLoss, DiceLoss, KlDivWithLogits, JsDivWithLogits,
             TvDistanceWithLogits, EntropyWithLogits, SoftmaxFocalLoss>;
using PointwiseLosses = LossList<HalfSquaredError, SquaredError>;

// What code that is compiled once must know of a loss of several rows.
struct MultirowTraits {
  int inputs, gradients;
  ItemTarget target;
  bool target_is_optional, target_weights, weighs_divisor, column_weights;
  int scale_parameter;  // which parameter must be positive; -1: none
  void (*prepare)(MultirowArgs&);
};
template <class... L>
inline const MultirowTraits& multirow_traits_of(LossList<L...>, int loss) {
  static constexpr MultirowTraits traits[] = {
      {L::kInputs, L::kGradients, L::kTarget, !L::kApart && L::kTarget == ItemTarget::index,
       L::kApart, L::kWeighsDivisor, L::kColumnWeights, L::kScaleParameter,
       [](MultirowArgs& a) { L::prepare(a); }}...};
  return traits[loss];
}
inline const MultirowTraits& multirow_traits(int loss) {
  return multirow_traits_of(MultirowLosses{}, loss);
}

}  // namespace mbk::MBK_ISA
