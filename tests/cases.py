"""The case list: one row a loss. Tests, benchmarks and the documentation's tables run over it.

A row is a formula, the functions that compute it, a builder of inputs, and the options that it is
tried with. Dtypes, layouts, reductions, reference values and the criterion follow from the row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from case import (
    ARITHMETIC,
    COLUMNS,
    DTYPES,
    REDUCTIONS,
    Case,
    Random,
    Sample,
    Variation,
    check,
    spacing,
)
from element_cases import ELEMENT_CASES
from torch import Tensor

import mbkern

__all__ = [
    "ARITHMETIC",
    "CASES",
    "COLUMNS",
    "DTYPES",
    "REDUCTIONS",
    "Case",
    "Sample",
    "Variation",
    "check",
    "spacing",
]


def _cross_entropy_terms(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    x = input.movedim(1, -1) if input.dim() > 1 else input
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    classes = x.shape[-1]
    w = torch.ones(classes, dtype=x.dtype) if weight is None else weight
    if target.is_floating_point():
        share = target.movedim(1, -1) if input.dim() > 1 else target
        kept = torch.ones(x.shape[:-1], dtype=torch.bool)
        weights = kept.to(x.dtype)
    else:
        kept = target.long() != ignore_index
        index = torch.where(kept, target.long(), 0)
        share = F.one_hot(index, classes).to(x.dtype)
        weights = w[index] * kept
    q = w * ((1 - label_smoothing) * share + label_smoothing / classes)
    lse = x.logsumexp(-1)
    losses = (q * (lse.unsqueeze(-1) - x)).sum(-1) + z_loss * lse**2
    return torch.where(kept, losses, 0), weights


def _logits(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    columns = shape[1] if len(shape) > 1 else shape[0]
    items = shape[:1] + shape[2:] if len(shape) > 1 else ()
    logits = 3 * torch.randn(shape, generator=random, dtype=torch.float64)
    return logits, torch.randint(columns, items, generator=random)


def _class_weight(sample: Sample, random: Random) -> Tensor:
    columns = sample.input.shape[1 if sample.input.dim() > 1 else 0]
    return torch.rand(columns, generator=random, dtype=torch.float64) + 0.25


def _item_weight(sample: Sample, random: Random) -> Tensor:
    shape = sample.input.shape
    items = shape[:1] + shape[2:] if len(shape) > 1 else torch.Size()
    return torch.rand(items, generator=random, dtype=torch.float64) + 0.25


def _some_ignored(sample: Sample, random: Random) -> Tensor:
    ignored = torch.rand(sample.target.shape, generator=random) < 0.3
    return torch.where(ignored, -100, sample.target)


def _none_left(sample: Sample, random: Random) -> Tensor:
    return torch.full_like(sample.target, -100)


def _probabilities(sample: Sample, random: Random) -> Tensor:
    scores = torch.randn(sample.input.shape, generator=random, dtype=torch.float64)
    return scores.softmax(1 if scores.dim() > 1 else 0)


_EVERYTHING = {
    "weight": _class_weight,
    "sample_weight": _item_weight,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "softcap": 5.0,
}
_SMOOTHED = {"weight": _class_weight, "label_smoothing": 0.2}
_CROSS_ENTROPY = (
    Variation("plain"),
    Variation("weight", {"weight": _class_weight}),
    Variation("smoothing", {"label_smoothing": 0.1}),
    Variation("ignored", target=_some_ignored),
    Variation("all ignored", target=_none_left),
    Variation("ignored class", {"ignore_index": 0, "label_smoothing": 0.1}),
    Variation("weight, smoothing, ignored", _SMOOTHED, target=_some_ignored),
    Variation("probabilities", target=_probabilities),
    Variation("weighted probabilities", _SMOOTHED, target=_probabilities),
    Variation("z-loss", {"z_loss": 1e-2}, torch=False),
    Variation("soft cap", {"softcap": 5.0}, torch=False),
    Variation("sample weight", {"sample_weight": _item_weight}, torch=False),
    Variation("everything", _EVERYTHING, torch=False, target=_some_ignored),
    Variation("everything, probabilities", _EVERYTHING, torch=False, target=_probabilities),
)

CASES = (
    Case(
        "cross_entropy", _cross_entropy_terms, F.cross_entropy,
        mbkern.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss, _logits, _CROSS_ENTROPY,
    ),
    *ELEMENT_CASES,
)  # fmt: skip
