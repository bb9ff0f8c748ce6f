"""The losses as formulas of torch operations, differentiable any number of times.

Used where a kernel cannot serve: second derivatives, and the gradient of class probabilities under
a transform. Values agree with the kernels to rounding, not bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mbkern._launch import RowOptions
from mbkern._launch_pointwise import Inputs, TensorOptions
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
    losses: Tensor, weights: Tensor, o: RowOptions | TensorOptions, dtype: torch.dtype
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


def tensor_loss(loss: Loss, inputs: Inputs, options: TensorOptions, dtype: torch.dtype) -> Tensor:
    """A loss over several tensors with these options."""
    given = [_compute(t) for t in inputs if t is not None]
    numbers = dict(zip(loss.parameters, options.parameters, strict=True))
    losses = _TENSORS[loss.name](*given, **numbers)
    if options.weight is not None:
        losses = losses * _compute(options.weight).to(losses.dtype)
    weights = torch.ones_like(losses)
    if options.sample_weight is not None:
        weights = _compute(options.sample_weight).to(losses.dtype).expand(losses.shape)
        losses = losses * weights
    return _reduce(losses, weights, options, dtype)


# ---- element-wise formulas, see csrc/losses ------------------------------------------------------


def _log_cosh(x: Tensor, y: Tensor) -> Tensor:
    a = (x - y).abs()
    return a + F.softplus(-2 * a) - math.log(2)


def _quantile(x: Tensor, y: Tensor, quantile: float) -> Tensor:
    r = y - x
    return torch.where(
        r > 0, quantile * r, torch.where(r < 0, (quantile - 1) * r, 0.0 * r.detach())
    )


def _tweedie(x: Tensor, y: Tensor, power: float, log_input: float, eps: float) -> Tensor:
    log_mean = x if log_input else x.clamp(min=eps).log()
    a = -log_mean if power == 1 else torch.exp((1 - power) * log_mean) / (power - 1)
    b = log_mean if power == 2 else torch.exp((2 - power) * log_mean) / (2 - power)
    return y * a + b


def _sigmoid_focal(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    ce = y * F.softplus(-x) + (1 - y) * F.softplus(x)
    loss = (s * (1 - y) + rest * y) ** gamma * ce
    return loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss


def _gaussian(x: Tensor, y: Tensor, var: Tensor, full: float, eps: float) -> Tensor:
    v = var + (var.detach().clamp(min=eps) - var.detach())
    loss = 0.5 * (v.log() + (x - y).square() / v)
    return loss + 0.5 * math.log(2 * math.pi) if full else loss


def _poisson(x: Tensor, y: Tensor, log_input: float, full: float, eps: float) -> Tensor:
    return F.poisson_nll_loss(x, y, bool(log_input), bool(full), eps=eps, reduction="none")


_TENSORS: dict[str, Callable[..., Tensor]] = {
    "mse_loss": lambda x, y: (x - y).square(),
    "half_squared_error": lambda x, y: (x - y).square() / 2,
    "l1_loss": lambda x, y: (x - y).abs(),
    "smooth_l1_loss": lambda x, y, beta: F.smooth_l1_loss(x, y, reduction="none", beta=beta),
    "huber_loss": lambda x, y, delta: F.huber_loss(x, y, "none", delta),
    "log_cosh_loss": _log_cosh,
    "quantile_loss": _quantile,
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(x, y, reduction="none"),
    "binary_cross_entropy_with_logits": lambda x, y, pos_weight=None: (
        F.binary_cross_entropy_with_logits(x, y, reduction="none", pos_weight=pos_weight)
    ),
    "sigmoid_focal_loss": _sigmoid_focal,
    "soft_margin_loss": lambda x, y: F.softplus(-y * x),
    "hinge_embedding_loss": lambda x, y, margin: F.hinge_embedding_loss(
        x, y, margin, reduction="none"
    ),
    "hinge_loss": lambda x, y, margin: (margin - y * x).clamp_min(0),
    "squared_hinge_loss": lambda x, y, margin: (margin - y * x).clamp_min(0).square(),
    "margin_ranking_loss": lambda x, y, t, margin: (margin - t * (x - y)).clamp_min(0),
    "kl_div": lambda x, y, log_target: F.kl_div(
        x, y, reduction="none", log_target=bool(log_target)
    ),
    "poisson_nll_loss": _poisson,
    "gaussian_nll_loss": _gaussian,
    "tweedie_nll_loss": _tweedie,
}
_ROWS = {"cross_entropy": _cross_entropy}


def is_available(loss: Loss) -> bool:
    """Whether this loss has a formula here."""
    return loss.name in _ROWS or loss.name in _TENSORS
