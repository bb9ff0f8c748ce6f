"""Losses of rows of several tensors in fp64: what the kernels are tested against.

The columns are the last dimension. A formula returns the loss of each item and its weight in the
mean; ``..._size`` the sums of the magnitudes of its terms, in the loss and in each gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from case import ramp
from row_case import Terms
from torch import Tensor

EPSILON = 9.999999960041972e-13  # torch's of cosines: 1e-12 as a float


def _plain(losses: Tensor) -> Terms:
    return losses, torch.ones_like(losses)


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _kept(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    kept = target.long() != ignore_index
    return kept, torch.where(kept, target.long(), 0)


def nll(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100
) -> Terms:
    kept, index = _kept(target, ignore_index)
    w = kept.to(input.dtype) if weight is None else weight[index] * kept
    return torch.where(kept, -_at(input, index) * w, 0), w


def multi_margin(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None
) -> Terms:
    t = target.long()
    others = torch.arange(input.shape[-1]) != t.unsqueeze(-1)
    terms = torch.relu(margin - _at(input, t).unsqueeze(-1) + input) ** p
    losses = torch.where(others, terms, 0).sum(-1) / input.shape[-1]
    return _plain(losses if weight is None else losses * weight[t])


def multi_margin_size(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    t = target.long()
    z = abs(margin) + _at(input, t).abs().unsqueeze(-1) + input.abs()
    w = (1 if weight is None else weight[t]) / input.shape[-1]
    return (z**p).sum(-1) * w, (p * z ** (p - 1)).sum(-1, keepdim=True) * torch.as_tensor(
        w, dtype=z.dtype
    ).unsqueeze(-1)


def multilabel_margin(input: Tensor, target: Tensor) -> Terms:
    listed = (target >= 0).long().cumprod(-1).bool()
    count = int(listed.sum(-1).max()) if listed.numel() else 0
    wanted = torch.zeros_like(input).scatter_add(
        -1, torch.where(listed, target, 0).long(), listed.to(input.dtype)
    )
    losses = 0 * input.sum(-1)
    for k in range(count):
        x = _at(input, torch.where(listed, target, 0)[..., k].long())
        terms = torch.relu(1 - x.unsqueeze(-1) + input)
        counts = listed[..., k].unsqueeze(-1) & (wanted == 0)
        losses = losses + torch.where(counts, terms, 0).sum(-1)
    return _plain(losses / input.shape[-1])


def multilabel_margin_size(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    losses, _ = multilabel_margin(input, target)
    count = (target >= 0).long().cumprod(-1).sum(-1)
    largest = input.abs().amax(-1)
    return losses + count * (1 + 2 * largest), torch.zeros_like(input)  # whole numbers


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def multilabel_soft_margin(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Terms:
    terms = target * _softplus(-input) + (1 - target) * _softplus(input)
    return _plain((terms if weight is None else terms * weight).mean(-1))


def multilabel_soft_margin_size(
    input: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    w = (torch.ones_like(input) if weight is None else weight) / input.shape[-1]
    losses, _ = multilabel_soft_margin(input, target, weight)
    return losses, w * (torch.sigmoid(input) + target), w * input.abs()


def cosine(input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0) -> Terms:
    a, b = (x.square().sum(-1) + EPSILON for x in (input1, input2))
    cosine = (input1 * input2).sum(-1) / (a * b).sqrt()
    far = torch.where(target == -1, ramp(cosine - margin), 0)
    return _plain(torch.where(target == 1, 1 - cosine, far))


def cosine_size(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0
) -> tuple[Tensor, ...]:
    a, b = ((x.square().sum(-1) + EPSILON).sqrt().unsqueeze(-1) for x in (input1, input2))
    x, y = input1.abs() / a, input2.abs() / b
    cosine = (x * y).sum(-1, keepdim=True)
    return 1 + abs(margin) + cosine.squeeze(-1), (y + x * cosine) / a, (x + y * cosine) / b


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    eps: float = 1e-6,
    swap: bool = False,
) -> Terms:
    near, far = ((anchor - x + eps).norm(dim=-1) for x in (positive, negative))
    if swap:
        far = torch.minimum(far, (positive - negative + eps).norm(dim=-1))
    return _plain(ramp(margin + near - far))


def triplet_size(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    eps: float = 1e-6,
    swap: bool = False,
) -> tuple[Tensor, ...]:
    def unit(x: Tensor, y: Tensor) -> Tensor:
        length = (x - y + eps).norm(dim=-1, keepdim=True)
        return torch.where(length > 0, (x.abs() + y.abs()) / length, 0)

    near, far = ((anchor - x + eps).norm(dim=-1) for x in (positive, negative))
    p, n = unit(anchor, positive), unit(anchor, negative)
    between = unit(positive, negative) if swap else torch.zeros_like(p)
    return abs(margin) + near + far, p + n, p + between, n + between


def dice(input: Tensor, target: Tensor, smooth: float = 1.0) -> Terms:
    over = input.sum(-1) + target.sum(-1) + smooth
    return _plain((input * (1 - target) + target * (1 - input)).sum(-1) / over)


def dice_size(input: Tensor, target: Tensor, smooth: float = 1.0) -> tuple[Tensor, ...]:
    over = (input.sum(-1) + target.sum(-1) + smooth).unsqueeze(-1)
    losses, _ = dice(input, target, smooth)
    own = losses.unsqueeze(-1)
    return losses, (1 + 2 * target + own) / over, (1 + 2 * input + own) / over


def focal(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Terms:
    kept, index = _kept(target, ignore_index)
    log_p = _at(*_logs(temperature, input), index)
    w = kept.to(input.dtype) if weight is None else weight[index] * kept
    losses = log_p if gamma == 0 else (-torch.expm1(log_p)) ** gamma * log_p
    return torch.where(kept, -losses * w, 0), w


def info_nce(similarity: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Terms:
    index = torch.arange(similarity.shape[0]) if target is None else target
    return focal(similarity, index, 0.0, temperature=temperature)


def _counted(losses: Tensor, target: Tensor | None, ignore_index: int) -> Terms:
    if target is None:
        return _plain(losses)
    kept, _ = _kept(target, ignore_index)
    return torch.where(kept, losses, 0), kept.to(losses.dtype)


def _kl_of(p: Tensor, q: Tensor) -> Tensor:
    """Of logarithms."""
    return (p.exp() * (p - q)).sum(-1)


def _shifted(temperature: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less the largest one, and the sum of the exponentials of the others."""
    top = x.detach().argmax(-1, keepdim=True)
    others = torch.arange(x.shape[-1]) != top
    a = torch.where(others, x - x.gather(-1, top), 0) / temperature
    return a, torch.where(others, a.exp(), 0).sum(-1, keepdim=True)


def _logs(temperature: float, *logits: Tensor) -> list[Tensor]:
    """Of probabilities; that of a sure class is right in its digits, unlike log_softmax's."""
    return [a - rest.log1p() for a, rest in (_shifted(temperature, x) for x in logits)]


def kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    p, t = _logs(temperature, student, teacher)
    losses = _kl_of(t, p) if direction == "forward" else _kl_of(p, t)
    return _counted(losses, target, ignore_index)


def kl_size(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
    **target: Any,
) -> tuple[Tensor, ...]:
    """The logarithm of a ratio is a difference of distances from the largest logits."""
    if direction == "reverse":
        losses, y, x = kl_size(teacher, student, temperature, **target)
        return losses, x, y
    p, t = _logs(temperature, student, teacher)
    x, y = ((z - z.amax(-1, keepdim=True)).abs() / temperature for z in (student, teacher))
    ratio = x + y + 1
    own = _kl_of(t, p).unsqueeze(-1)
    p, t = p.exp(), t.exp()
    return (t * ratio + p).sum(-1), (p + t) / temperature, t * (ratio + own) / temperature


def js(
    student: Tensor,
    teacher: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    p, t = _logs(temperature, student, teacher)
    m = torch.logaddexp(t + math.log(beta), p + math.log1p(-beta))
    return _counted(beta * _kl_of(t, m) + (1 - beta) * _kl_of(p, m), target, ignore_index)


def js_size(
    student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0, **target: Any
) -> tuple[Tensor, ...]:
    """An error of either probability counts by the logarithm of the ratio to the mixture's."""
    p, t = _logs(temperature, student, teacher)
    m = torch.logaddexp(t + math.log(beta), p + math.log1p(-beta))
    sizes = []
    for q, share in ((p, 1 - beta), (t, beta)):
        own = _kl_of(q, m).unsqueeze(-1)
        sizes.append(share / temperature * (q.exp() * ((q - m).abs() + own) + m.exp()))
    return (sizes[0] + sizes[1]).sum(-1) * temperature, *sizes


def tv(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    p, t = ((x / temperature).softmax(-1) for x in (student, teacher))
    return _counted(0.5 * (p - t).abs().sum(-1), target, ignore_index)


def tv_size(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, **target: Any
) -> tuple[Tensor, ...]:
    p, t = ((x / temperature).softmax(-1) for x in (student, teacher))
    return 0.5 * (p + t).sum(-1), p / temperature, t / temperature


def entropy(
    input: Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    a, rest = _shifted(temperature, input)
    losses = (rest.log1p() - (a.exp() * a).sum(-1, keepdim=True) / (1 + rest)).squeeze(-1)
    return _counted(losses, target, ignore_index)


def entropy_size(input: Tensor, temperature: float = 1.0, **target: Any) -> tuple[Tensor, ...]:
    (p,) = _logs(temperature, input)
    own = -(p.exp() * p).sum(-1)
    return own, p.exp() * (own.unsqueeze(-1) - p) / temperature
