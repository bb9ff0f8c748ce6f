"""The losses as formulas of torch operations, differentiable any number of times.

Used where a kernel cannot serve: second derivatives, and the gradient of class probabilities under
a transform. Values agree with the kernels to rounding, not bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern._launch import RowOptions
from mbkern._launch_pointwise import PointwiseOptions
from mbkern._losses import Loss


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _cross_entropy(input: Tensor, target: Tensor, o: RowOptions) -> tuple[Tensor, Tensor]:
    """The loss of each item, sum_j q_j (lse - c_j) + z lse^2, and its weight in the mean.

    See csrc/losses/cross_entropy.h.
    """
    x = _compute(input)
    x = x.movedim(1, -1) if x.dim() > 1 else x
    if o.softcap is not None:
        x = o.softcap * torch.tanh(x / o.softcap)
    classes = x.shape[-1]
    w = torch.ones_like(x[..., 0]).unsqueeze(-1)
    if o.weight is not None:
        w = _compute(o.weight).to(x.dtype)
    log_p = torch.log_softmax(x, -1)
    has_index = target.shape != input.shape
    if has_index:
        target = target.long()
        counted = target != o.ignore_index
        index = torch.where(counted, target, 0)
        # Not one_hot, which looks at the values: under vmap there is nothing to look at.
        numbers = torch.arange(classes, device=x.device)
        share = (index.unsqueeze(-1) == numbers).to(x.dtype)
        weights = w.expand(share.shape).gather(-1, index.unsqueeze(-1)).squeeze(-1) * counted
    else:
        share = target.to(x.dtype).movedim(1, -1) if target.dim() > 1 else target.to(x.dtype)
        weights = torch.ones_like(x[..., 0])
    q = w * ((1.0 - o.label_smoothing) * share + o.label_smoothing / classes)
    # A class with q = 0 counts nothing, also where its probability is 0, as in torch with indices.
    terms = torch.where(q != 0, q * log_p, 0.0) if has_index else q * log_p
    losses = -terms.sum(-1)
    if o.z_loss:
        losses = losses + o.z_loss * torch.logsumexp(x, -1).square()
    return (torch.where(counted, losses, 0.0) if has_index else losses), weights


def _reduce(
    losses: Tensor, weights: Tensor, o: RowOptions | PointwiseOptions, dtype: torch.dtype
) -> Tensor:
    if o.reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if o.reduction == "mean" and o.denominator is not None:
        total = total / o.denominator
    elif o.reduction == "mean":  # of no items it is NaN, and the gradient of every item is 0
        divisor = weights.sum()
        none = divisor == 0
        total = torch.where(none, torch.nan, total / torch.where(none, 1.0, divisor))
    return total.to(dtype)


def row_loss(
    loss: Loss, input: Tensor, target: Tensor, options: RowOptions, dtype: torch.dtype
) -> Tensor:
    """A row loss with these options."""
    losses, weights = _ROWS[loss.name](input, target, options)
    if options.sample_weight is not None:
        weight = _compute(options.sample_weight).to(losses.dtype)
        losses, weights = losses * weight, weights * weight
    return _reduce(losses, weights, options, dtype)


def pointwise_loss(
    loss: Loss, input: Tensor, target: Tensor, options: PointwiseOptions, dtype: torch.dtype
) -> Tensor:
    """An element-wise loss with these options."""
    x, y = _compute(input), _compute(target)
    losses = _POINTWISE[loss.name](x, y, options.parameter)
    weights = torch.ones_like(losses)
    if options.weight is not None:
        weights = _compute(options.weight).to(losses.dtype).expand(losses.shape)
        losses = losses * weights
    return _reduce(losses, weights, options, dtype)


_ROWS = {"cross_entropy": _cross_entropy}
_POINTWISE = {
    "mse_loss": lambda x, y, _: (x - y).square(),
    "half_squared_error": lambda x, y, _: (x - y).square() / 2,
}


def is_available(loss: Loss) -> bool:
    """Whether this loss has a formula here."""
    return loss.name in _ROWS or loss.name in _POINTWISE
