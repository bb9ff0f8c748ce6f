"""Drop-in losses with the names, arguments and results of ``torch.nn.functional``.

Every function, but what is torch's own (``triplet_margin_with_distance_loss``), takes, besides
torch's arguments,

sample_weight:
    one weight an item, broadcast to the shape of the unreduced loss; ``mean`` then divides by the
    sum of the weights.
denominator:
    a number or 0-dim tensor that replaces the mean's divisor (``reduction="mean"`` only). With the
    item count of the whole mini-batch here, micro-batches add up to its exact mean.
inplace:
    write the gradient over the input: no memory for a gradient, and the input is gone. Refused for
    leaves that require grad. Not of ``linear_cross_entropy``.
grad_scale:
    a hint of the gradient that will come in (GradScaler's scale, for instance), so that 16-bit
    gradients can be formed in the forward pass without underflow. Changes no value.
loss_dtype:
    the dtype of the result, if not torch's (the input's, or float32 under autocast).

Inputs are float32, bfloat16, float16 or float64. 16-bit inputs are computed in float32 and rounded
once. Errors: ValueError for shapes and option values, TypeError for dtypes and tensor types,
IndexError for a class index out of range, NotImplementedError for weights, denominators and targets
that require a gradient which is not computed; nothing has been written then.
"""

import torch

from mbkern.functional._binary import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    hinge_embedding_loss,
    hinge_loss,
    margin_ranking_loss,
    sigmoid_focal_loss,
    soft_margin_loss,
    squared_hinge_loss,
)
from mbkern.functional._cross_entropy import cross_entropy
from mbkern.functional._distillation import (
    entropy_with_logits,
    js_div_with_logits,
    kl_div_with_logits,
    tv_distance_with_logits,
)
from mbkern.functional._likelihood import (
    gaussian_nll_loss,
    kl_div,
    poisson_nll_loss,
    tweedie_nll_loss,
)
from mbkern.functional._linear import linear_cross_entropy
from mbkern.functional._regression import (
    half_squared_error,
    huber_loss,
    l1_loss,
    log_cosh_loss,
    mse_loss,
    quantile_loss,
    smooth_l1_loss,
)
from mbkern.functional._rows import (
    cosine_embedding_loss,
    dice_loss,
    info_nce_loss,
    multi_margin_loss,
    multilabel_margin_loss,
    multilabel_soft_margin_loss,
    nll_loss,
    softmax_focal_loss,
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cross_entropy",
    "dice_loss",
    "entropy_with_logits",
    "gaussian_nll_loss",
    "half_squared_error",
    "hinge_embedding_loss",
    "hinge_loss",
    "huber_loss",
    "info_nce_loss",
    "js_div_with_logits",
    "kl_div",
    "kl_div_with_logits",
    "l1_loss",
    "linear_cross_entropy",
    "log_cosh_loss",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "quantile_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmax_focal_loss",
    "squared_hinge_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
    "tv_distance_with_logits",
    "tweedie_nll_loss",
]

for _name in __all__:  # torch.fx.symbolic_trace makes a node of each, as of torch's functions
    if not globals()[_name].__module__.startswith("torch"):
        torch.fx.wrap(_name)
