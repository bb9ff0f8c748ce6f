"""The losses as formulas of torch operations, differentiable any number of times.

Used where a kernel cannot serve: second derivatives, and the gradient of class probabilities under
a transform. Values agree with the kernels to rounding, not bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mbkern._launch import RowOptions
from mbkern._launch_tensors import Inputs, TensorOptions
from mbkern._losses import Loss

#: ``reduction="none"`` of torch's operations. Not those of ``torch.nn.functional``: inside
#: ``mbkern.patched()`` its losses come back here.
_NONE = 0
_nn: Any = torch._C._nn  # whose stub says that a reduction is a word


def gradients(
    formula: Callable[..., Tensor],
    tensors: tuple[Tensor | None, ...],
    incoming: Tensor,
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of a formula of tensors, of those that require grad.

    By views of them: one tensor may be two arguments, or one argument be computed from another
    (tied weights), and its whole derivative, which autograd would add up again, is not asked for.
    """
    parts = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
    needed = [t for t in parts if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            formula(*parts), needed, incoming, create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in parts)


def _compute(tensor: Tensor) -> Tensor:
    if forward_ad._current_level >= 0:
        tensor = tensor.resolve_neg()  # torch's movedim of a negated view has no tangent
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _ramp(x: Tensor) -> Tensor:
    """max(x, 0) with the kernels' slopes: 1 at 0, where clamp_min's is 0 from torch 2.14 on, and 0
    at NaN."""
    return torch.where(x >= 0, x, x.detach().clamp_min(0))


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
    even = torch.ones((), dtype=x.dtype, device=x.device) / classes  # a tensor to TorchScript
    q = w * ((1.0 - o.label_smoothing) * share + o.label_smoothing * even)
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
        return _rounded(losses, dtype)
    total = losses.sum()
    if o.reduction == "mean" and o.denominator is not None:
        total = total / o.denominator
    elif o.reduction == "mean":  # of no items it is NaN, and the gradient of every item is 0
        divisor = weights.sum()
        none = divisor == 0
        total = torch.where(none, torch.nan, total / torch.where(none, 1.0, divisor))
    return _rounded(total, dtype)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    if forward_ad._current_level >= 0:
        value = value.double()  # the tangent of 0-dim / number is, in torch; so both are rounded
    return value.to(dtype)


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
    numbers: dict[str, Any] = loss.named(options.parameters)
    if loss.kind == "multirow":
        losses, counts = _rows(loss, given, numbers, options)
        return _reduce_weighted(losses, counts, options, dtype)
    losses = _TENSORS[loss.name](*given, **numbers)
    if options.weight is not None:
        losses = losses * _compute(options.weight).to(losses.dtype)
    return _reduce_weighted(losses, torch.ones_like(losses), options, dtype)


def _reduce_weighted(
    losses: Tensor, weights: Tensor, options: TensorOptions, dtype: torch.dtype
) -> Tensor:
    if options.sample_weight is not None:
        weight = _compute(options.sample_weight).to(losses.dtype).expand(losses.shape)
        losses, weights = losses * weight, weights * weight
    return _reduce(losses, weights, options, dtype)


# ---- element-wise formulas, see csrc/losses ------------------------------------------------------


def _softplus(x: Tensor) -> Tensor:
    """Not torch's, which is x itself above a threshold, nor logaddexp, whose second derivative is
    NaN where an exponential overflows."""
    return -F.logsigmoid(-x)


def _log_cosh(x: Tensor, y: Tensor) -> Tensor:
    r = x - y
    near = r.abs() < 0.5
    far = torch.where(near, 1.0, r).abs()
    of_near = torch.log1p(2 * torch.sinh(torch.where(near, r, 0.0) / 2).square())
    return torch.where(near, of_near, far + _softplus(-2 * far) - math.log(2))


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


def _focus(q: Tensor, gamma: float) -> Tensor | float:
    """q^gamma, whose slope at 0 counts nothing, since the factor beside it is 0 there."""
    return torch.where(q == 0, 0.0, torch.where(q == 0, 1.0, q) ** gamma) if gamma else 1.0


def _sigmoid_focal(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    ce = y * _softplus(-x) + (1 - y) * _softplus(x)
    loss = _focus(s * (1 - y) + rest * y, gamma) * ce
    return loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss


def _gaussian(x: Tensor, y: Tensor, var: Tensor, full: float, eps: float) -> Tensor:
    v = var + (var.detach().clamp(min=eps) - var.detach())
    loss = 0.5 * (v.log() + (x - y).square() / v)
    return loss + 0.5 * math.log(2 * math.pi) if full else loss


def _poisson(x: Tensor, y: Tensor, log_input: float, full: float, eps: float) -> Tensor:
    loss = torch.poisson_nll_loss(x, y, bool(log_input), False, eps, _NONE)
    if not full:
        return loss
    some = torch.where(y > 1, y, 1.0)  # torch's own has NaN in the derivative by a target of 0
    stirling = some * some.log() - some + 0.5 * torch.log(2 * math.pi * some)
    return loss + torch.where(y > 1, stirling, 0.0)


_LEAST_LOG = -100.0  # torch's


def _log_probability(p: Tensor) -> Tensor:
    usual = p > math.exp(_LEAST_LOG)
    return torch.where(usual, torch.where(usual, p, 1.0).log(), _LEAST_LOG)


def _binary(x: Tensor, y: Tensor) -> Tensor:
    """Torch's, whose derivative by the target is infinite at 0 and 1, where the loss's is not."""
    loss: Tensor = _nn.binary_cross_entropy(x, y.detach(), None, _NONE)
    return loss + (y - y.detach()) * (_log_probability(1 - x) - _log_probability(x))


_TENSORS: dict[str, Callable[..., Tensor]] = {
    "mse_loss": lambda x, y: (x - y).square(),
    "half_squared_error": lambda x, y: (x - y).square() / 2,
    "l1_loss": lambda x, y: (x - y).abs(),
    "smooth_l1_loss": lambda x, y, beta: _nn.smooth_l1_loss(x, y, _NONE, beta),
    "huber_loss": lambda x, y, delta: _nn.huber_loss(x, y, _NONE, delta),
    "log_cosh_loss": _log_cosh,
    "quantile_loss": _quantile,
    "binary_cross_entropy": _binary,
    "binary_cross_entropy_with_logits": lambda x, y, pos_weight=None: (
        torch.binary_cross_entropy_with_logits(x, y, None, pos_weight, _NONE)
    ),
    "sigmoid_focal_loss": _sigmoid_focal,
    "soft_margin_loss": lambda x, y: _softplus(-y * x),
    "hinge_embedding_loss": lambda x, y, margin: (
        torch.where(y == -1, 0.0, x) + torch.where(y == 1, 0.0, _ramp(margin - x))
    ),
    "hinge_loss": lambda x, y, margin: _ramp(margin - y * x),
    "squared_hinge_loss": lambda x, y, margin: _ramp(margin - y * x).square(),
    "margin_ranking_loss": lambda x, y, t, margin: _ramp(margin - t * (x - y)),
    "kl_div": lambda x, y, log_target: torch.kl_div(x, y, _NONE, log_target=bool(log_target)),
    "poisson_nll_loss": _poisson,
    "gaussian_nll_loss": _gaussian,
    "tweedie_nll_loss": _tweedie,
}
_ROWS = {"cross_entropy": _cross_entropy}


# ---- formulas over rows, see csrc/losses; the rows are the last dimension here ---------------


def _rows(
    loss: Loss, given: list[Tensor], numbers: dict[str, Any], options: TensorOptions
) -> tuple[Tensor, Tensor]:
    """The loss of each item, and its weight in the mean."""
    rows = [t.movedim(1, -1) if t.dim() > 1 else t for t in given]
    weights = torch.ones_like(rows[0][..., 0])
    target = options.target
    if loss.target == "list" and target is not None:
        numbers["target"] = target.movedim(1, -1) if target.dim() > 1 else target
    elif loss.target == "label" and target is not None:
        numbers["target"] = _compute(target)
    elif target is not None:
        counted = target.long() != options.ignore_index
        index = torch.where(counted, target.long(), 0)
        if "target" not in loss.optional:
            numbers["target"] = index
        weights = counted.to(weights.dtype)
    if options.weight is not None:
        w = _compute(options.weight).to(weights.dtype)
        if loss.target == "index":
            of_item = w.expand(rows[0].shape).gather(-1, numbers["target"].unsqueeze(-1))
            numbers["weight"] = of_item.squeeze(-1)
        else:
            numbers["weight"] = w
    losses = _TENSORS[loss.name](*rows, **numbers)
    if target is not None and loss.target == "index":
        losses = torch.where(weights != 0, losses, 0.0)
    if loss.name in ("nll_loss", "softmax_focal_loss") and options.weight is not None:
        weights = weights * numbers["weight"]
    return losses, weights


def _picked(x: Tensor, target: Tensor) -> Tensor:
    return x.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _weighed(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses if weight is None else losses * weight


def _multi_margin(
    x: Tensor, target: Tensor, p: float, margin: float, weight: Tensor | None = None
) -> Tensor:
    terms = torch.pow(F.relu(margin - _picked(x, target).unsqueeze(-1) + x), int(p))
    others = torch.arange(x.shape[-1], device=x.device) != target.unsqueeze(-1)
    return _weighed(torch.where(others, terms, 0.0).sum(-1) / x.shape[-1], weight)


def _multilabel_margin(x: Tensor, target: Tensor) -> Tensor:
    count = x.shape[-1]
    listed = (target >= 0).cumprod(-1).bool()  # up to the first negative number
    index = torch.where(listed, target, 0).long()
    numbers = torch.arange(count, device=x.device)
    wanted = ((index.unsqueeze(-1) == numbers) & listed.unsqueeze(-1)).any(-2)
    terms = F.relu(1 - x.gather(-1, index).unsqueeze(-1) + x.unsqueeze(-2))
    pairs = listed.unsqueeze(-1) & ~wanted.unsqueeze(-2)
    return torch.where(pairs, terms, 0.0).sum((-1, -2)) / count


def _multilabel_soft_margin(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    return _weighed(y * _softplus(-x) + (1 - y) * _softplus(x), weight).mean(-1)


def _cosine(x: Tensor, y: Tensor, target: Tensor, margin: float) -> Tensor:
    eps = 9.999999960041972e-13  # torch's: 1e-12 as a float
    norms = (x.square().sum(-1) + eps) * (y.square().sum(-1) + eps)
    cosine = (x * y).sum(-1) / norms.sqrt()
    far = torch.where(target == -1, _ramp(cosine - margin), 0.0)
    return torch.where(target == 1, 1 - cosine, far)


def _triplet(a: Tensor, p: Tensor, n: Tensor, margin: float, eps: float, swap: float) -> Tensor:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x - y + eps, dim=-1)
        return norm

    far = distance(a, n)
    if swap:
        far = torch.minimum(far, distance(p, n))
    return _ramp(margin + distance(a, p) - far)


def _dice(x: Tensor, y: Tensor, smooth: float) -> Tensor:
    return 1 - (2 * (x * y).sum(-1) + smooth) / (x.sum(-1) + y.sum(-1) + smooth)


def _softmax_focal(
    x: Tensor, target: Tensor, gamma: float, temperature: float, weight: Tensor | None = None
) -> Tensor:
    log_p = _picked(torch.log_softmax(x / temperature, -1), target)
    return _weighed(-(_focus(-torch.expm1(log_p), gamma) * log_p), weight)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """What has no probability counts nothing, and its logarithm may be -inf."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def _kl(x: Tensor, y: Tensor, temperature: float, direction: str) -> Tensor:
    student, teacher = (torch.log_softmax(t / temperature, -1) for t in (x, y))
    if direction == "reverse":
        return _divergence(student, teacher)
    return _divergence(teacher, student)


def _js(x: Tensor, y: Tensor, temperature: float, beta: float) -> Tensor:
    student, teacher = (torch.log_softmax(t / temperature, -1) for t in (x, y))
    if beta in (0, 1):  # of one of them from itself
        return 0.0 * (student.exp() + teacher.exp()).sum(-1)
    # In logarithms: the probabilities of both may underflow, or be 0.
    a, b = teacher + math.log(beta), student + math.log1p(-beta)
    more, less = torch.maximum(a, b), torch.minimum(a, b)
    middle = more + _softplus(torch.where(more > -math.inf, less - more, 0.0))
    return beta * _divergence(teacher, middle) + (1 - beta) * _divergence(student, middle)


def _tv(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    student, teacher = (torch.softmax(t / temperature, -1) for t in (x, y))
    return 0.5 * (student - teacher).abs().sum(-1)


def _entropy(x: Tensor, temperature: float) -> Tensor:
    log_p = torch.log_softmax(x / temperature, -1)
    return -_divergence(log_p, torch.zeros_like(log_p))


_TENSORS.update(
    nll_loss=lambda x, target, weight=None: _weighed(-_picked(x, target), weight),
    multi_margin_loss=_multi_margin,
    multilabel_margin_loss=_multilabel_margin,
    multilabel_soft_margin_loss=_multilabel_soft_margin,
    cosine_embedding_loss=_cosine,
    triplet_margin_loss=_triplet,
    dice_loss=_dice,
    softmax_focal_loss=_softmax_focal,
    kl_div_with_logits=_kl,
    js_div_with_logits=_js,
    tv_distance_with_logits=_tv,
    entropy_with_logits=_entropy,
)


def is_available(loss: Loss) -> bool:
    """Whether this loss has a formula here."""
    return loss.name in _ROWS or loss.name in _TENSORS
