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


def of_logits(z: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """What (rows, classes, ...) capped logits say of each item, all but the log-sum-exp: whether it
    counts, whether it is right, the predicted class, the entropy, sum q_j z_j and sum q_j."""
    predicted = z.argmax(1)
    entropy = torch.special.entr(torch.softmax(z, 1)).sum(1)
    if target.shape == z.shape:
        counted = torch.ones_like(predicted, dtype=torch.bool)
        hit = target.argmax(1) == predicted
        logit = torch.where(target == 0, 0, target * z).sum(1)
        return counted, hit, predicted, entropy, logit, target.sum(1).to(z.dtype)
    counted = target != ignore_index
    known = torch.where(counted, target, 0).long()
    hit = (known == predicted) & counted
    logit = z.gather(1, known.unsqueeze(1)).squeeze(1)
    return counted, hit, predicted, entropy, logit, torch.ones_like(logit)


def gather(parts: tuple[Tensor, ...], lse: Tensor) -> LinearStats:
    """All items' statistics, in the shape of ``lse``, and what they come to."""
    counted, hit, predicted, entropy, logit, mass = (p.reshape(lse.shape) for p in parts)
    none, count = ~counted, counted.sum()
    log_prob = (logit - mass * lse.detach()).masked_fill(none, 0)
    return LinearStats(
        count, hit.sum() / count, predicted.masked_fill(none, -1), log_prob,
        entropy.masked_fill(none, 0), lse.masked_fill(none, 0),
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
        kinds = (torch.bool, torch.bool, torch.int64, lse.dtype, lse.dtype, lse.dtype)
        found = list(zip(*self._parts, strict=True)) if self._parts else [()] * len(kinds)
        parts = []
        for values, dtype in zip(found, kinds, strict=True):
            rows = [v.reshape(-1, lse.shape[1]).to(dtype) for v in values]
            part = torch.cat(rows) if rows else lse.new_zeros((0, lse.shape[1]), dtype=dtype)
            if kept is not None:
                part = lse.new_zeros(lse.shape, dtype=dtype).index_copy_(0, kept, part)
            parts.append(part)
        return gather(tuple(parts), lse.reshape(shape))
