"""Seeded tensors for losses of rows: a builder takes the shape and returns tensors by name."""

from __future__ import annotations

import torch
from row_case import Random, RowSample, Tensors
from torch import Tensor


def items_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the unreduced loss."""
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def _columns(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else shape[0]


def _normal(shape: tuple[int, ...], random: Random, factor: float = 1.0) -> Tensor:
    return factor * torch.randn(shape, generator=random, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], random: Random) -> Tensor:
    return torch.rand(shape, generator=random, dtype=torch.float64)


def _classes(shape: tuple[int, ...], random: Random) -> Tensor:
    return torch.randint(_columns(shape), items_of(shape), generator=random)


def logits(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _normal(shape, random, 3), "target": _classes(shape, random)}


def log_probabilities(shape: tuple[int, ...], random: Random) -> Tensors:
    logits = _normal(shape, random, 3).log_softmax(1 if len(shape) > 1 else 0)
    return {"input": logits, "target": _classes(shape, random)}


def labels(shape: tuple[int, ...], random: Random) -> Tensors:
    """Up to five classes an item, one of them twice, up to a -1; then what does not count."""
    input, columns = _normal(shape, random), _columns(shape)
    order = torch.rand(shape, generator=random).argsort(-1)
    counts = torch.randint(min(columns, 5) + 1, (*items_of(shape), 1), generator=random)
    target = torch.where(torch.arange(columns) == counts, -1, order)
    if columns > 4 and len(shape) > 1:
        target[::3, 1] = target[::3, 0]
    return {"input": input, "target": target}


def multi_hot(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _normal(shape, random, 3), "target": _uniform(shape, random)}


def pairs(shape: tuple[int, ...], random: Random) -> Tensors:
    signs = torch.randint(3, items_of(shape), generator=random) * 3 % 5 - 1  # -1, 2, 0
    signs = torch.where(signs == 2, 1, signs)
    pair = {f"input{k}": _normal(shape, random) for k in (1, 2)}
    return {**pair, "target": signs.double()}


def triples(shape: tuple[int, ...], random: Random) -> Tensors:
    return {n: _normal(shape, random) for n in ("anchor", "positive", "negative")}


def shares(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _uniform(shape, random), "target": _uniform(shape, random)}


def distributions(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"student": _normal(shape, random, 2), "teacher": _normal(shape, random, 2)}


def similarities(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"similarity": _normal(shape, random), "target": _classes(shape, random)}


def alone(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _normal(shape, random, 2)}


def _first(sample: RowSample) -> tuple[int, ...]:
    return tuple(next(iter(sample.tensors.values())).shape)


def class_weight(sample: RowSample, random: Random) -> Tensor:
    """One weight a class."""
    return _uniform((_columns(_first(sample)),), random) + 0.25


def item_weight(sample: RowSample, random: Random) -> Tensor:
    """One weight an item."""
    return _uniform(items_of(_first(sample)), random) + 0.25


def some_ignored(sample: RowSample, random: Random) -> Tensor:
    target = _classes(_first(sample), random)
    return torch.where(torch.rand(target.shape, generator=random) < 0.3, -100, target)


def any_class(sample: RowSample, random: Random) -> Tensor:
    return _classes(_first(sample), random)


def none_left(sample: RowSample, random: Random) -> Tensor:
    return torch.full(items_of(_first(sample)), -100)
