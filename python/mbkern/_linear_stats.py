"""What the head's logits say besides the loss, seen while they are there: ``return_stats``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_BYTES = 2 << 20  # of float32 logits at once


class LinearStats(NamedTuple):
    """Statistics of a call of ``linear_cross_entropy``; nothing in it waits for a device.

    Those of every item have the shape of the unreduced loss; of an ignored item they are 0, and its
    prediction is -1. Logits are those after ``logit_scale`` and ``softcap``.

    Attributes:
        items: 0-dim int64: how many items are not ignored.
        accuracy: 0-dim float32: the share of them whose target is the largest logit (of class
            probabilities: whose most probable class is); NaN if there are none.
        predictions: int64: the class of the largest logit, the first one of equals.
        log_prob: float32 (float64): log-probability of the target class; of class probabilities the
            sum of probability times log-probability.
        entropy: float32 (float64): of the softmax, in nats.
        lse: float32 (float64): log-sum-exp of the logits; differentiable, at the cost of three to
            four more products in backward.
    """

    items: Tensor
    accuracy: Tensor
    predictions: Tensor
    log_prob: Tensor
    entropy: Tensor
    lse: Tensor


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """The logits that the softmax is of."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def cap_slope(z: Tensor, softcap: float) -> Tensor:
    """d capped / d z = 1 - tanh^2 (z / softcap), without the cancellation where tanh is near 1."""
    e = torch.exp(z.abs() * (-2.0 / softcap))
    return 4.0 * e / (1.0 + e) ** 2


def class_or_0(target: Tensor, classes: int) -> Tensor:
    """Class indices to index with: on CUDA nobody has asked whether a target is a class."""
    return torch.where((target >= 0) & (target < classes), target, 0).long()


def log_prob(distance: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
    """log p_j of c_j - m, m and log sum exp(c_k - m): no sum of large numbers that cancel.

    Where m is infinite, so is the log-sum-exp, m itself.
    """
    return distance - torch.where(largest.isinf(), 0.0, log_sum)


def of_logits(z: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """What (rows, classes, ...) capped logits say of each item, all but the log-sum-exp: whether it
    counts, whether it is right, the predicted class, the entropy and the log-probability."""
    predicted = z.argmax(1, keepdim=True)
    entropy = torch.special.entr(torch.softmax(z, 1)).sum(1)
    largest = z.gather(1, predicted)
    distance = z - largest
    others = torch.exp(distance).scatter(1, predicted, 0.0).sum(1, keepdim=True)
    log_sum = torch.log1p(others)
    first = predicted.squeeze(1)
    if target.shape == z.shape:
        counted = torch.ones_like(first, dtype=torch.bool)
        hit = target.argmax(1) == first
        terms = target * log_prob(distance, largest, log_sum)
        of_target = torch.where(target == 0, 0, terms).sum(1).to(z.dtype)
        return counted, hit, first, entropy, of_target
    counted = target != ignore_index
    known = class_or_0(target, z.shape[1])
    hit = (target == first) & counted
    of_target = log_prob(distance.gather(1, known.unsqueeze(1)), largest, log_sum).squeeze(1)
    return counted, hit, first, entropy, of_target.masked_fill(known != target, torch.nan)


def gather(parts: tuple[Tensor, ...], lse: Tensor) -> LinearStats:
    """All items' statistics, in the shape of ``lse``, and what they come to."""
    counted, hit, predicted, entropy, of_target = (p.reshape(lse.shape) for p in parts)
    none, count = ~counted, counted.sum()
    return LinearStats(
        count, hit.sum().float() / count, predicted.masked_fill(none, -1),
        of_target.masked_fill(none, 0), entropy.masked_fill(none, 0), lse.masked_fill(none, 0),
    )  # fmt: skip


class Collector:
    """Statistics of the chunks of one call, of the rows that are computed."""

    def __init__(self, ignore_index: int, softcap: float | None) -> None:
        self._ignore_index, self._softcap = ignore_index, softcap
        self._parts: list[tuple[Tensor, ...]] = []
        self._lse: list[Tensor] = []

    def see(self, z: Tensor, target: Tensor, wide: torch.dtype) -> None:
        """Look at a chunk's logits, (rows, classes, ...), before the gradient is written over."""
        rows = max(1, _BLOCK_BYTES // max(1, 4 * z[:1].numel()))
        for x, t in zip(torch.split(z, rows), torch.split(target, rows), strict=True):
            logits = capped(x.to(wide), self._softcap)
            self._parts.append(of_logits(logits, t, self._ignore_index))
            self._lse.append(torch.logsumexp(logits, 1).reshape(logits.shape[0], -1))

    def log_sum_exp(self, kept: Tensor | None, like: Tensor, shape: torch.Size) -> Tensor:
        """Return (rows, inner) of all items; 0 in rows that were not computed.

        Args:
            kept: which rows were computed, None: all.
            like: gives dtype and device.
            shape: (rows, inner).
        """
        lse = torch.cat(self._lse) if self._lse else like.new_zeros((0, shape[1]))
        return lse if kept is None else lse.new_zeros(shape).index_copy_(0, kept, lse)

    def finish(self, lse: Tensor, kept: Tensor | None, shape: torch.Size) -> LinearStats:
        """Return the statistics.

        Args:
            lse: what ``log_sum_exp`` returned, or as much.
            kept: which rows were computed, None: all.
            shape: of the unreduced loss.
        """
        kinds = (torch.bool, torch.bool, torch.int64, lse.dtype, lse.dtype)
        found = list(zip(*self._parts, strict=True)) if self._parts else [()] * len(kinds)
        parts = []
        for values, dtype in zip(found, kinds, strict=True):
            rows = [v.reshape(-1, lse.shape[1]).to(dtype) for v in values]
            part = torch.cat(rows) if rows else lse.new_zeros((0, lse.shape[1]), dtype=dtype)
            if kept is not None:
                part = lse.new_zeros(lse.shape, dtype=dtype).index_copy_(0, kept, part)
            parts.append(part)
        return gather(tuple(parts), lse.reshape(shape))
