#pragma once
// Every loss, once. A loss's position in its list is its number in the tables and in the binding.
#include "losses/binary_cross_entropy.h"
#include "losses/binary_cross_entropy_with_logits.h"
#include "losses/cosine_embedding.h"
#include "losses/cross_entropy.h"
#include "losses/dice.h"
#include "losses/gaussian_nll.h"
#include "losses/hinge.h"
#include "losses/hinge_embedding.h"
#include "losses/huber.h"
#include "losses/kl_div.h"
#include "losses/l1.h"
#include "losses/log_cosh.h"
#include "losses/margin_ranking.h"
#include "losses/margins.h"
#include "losses/multilabel_soft_margin.h"
#include "losses/nll.h"
#include "losses/poisson_nll.h"
#include "losses/quantile.h"
#include "losses/sigmoid_focal.h"
#include "losses/smooth_l1.h"
#include "losses/soft_margin.h"
#include "losses/softmax_distances.h"
#include "losses/softmax_focal.h"
#include "losses/squared_error.h"
#include "losses/squared_hinge.h"
#include "losses/triplet_margin.h"
#include "losses/tweedie_nll.h"

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
using PointwiseLosses =
    LossList<HalfSquaredError, SquaredError, BinaryCrossEntropy, BinaryCrossEntropyWithLogits,
             GaussianNll, Hinge, HingeEmbedding, Huber, KLDivergence, AbsoluteError, LogCosh,
             MarginRanking, PoissonNll, Quantile, SigmoidFocal, SmoothL1, SoftMargin, SquaredHinge,
             TweedieNll>;

// How many inputs an element-wise loss has.
template <class... L>
MBK_HOST_FN int inputs_of(LossList<L...>, int loss) {
  constexpr int inputs[] = {L::kInputs...};
  return inputs[loss];
}

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
