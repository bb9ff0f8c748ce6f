"""The fused head over a vocabulary that is cut over processes: each has some of the classes.

Every rank has all rows of hidden states and targets, and the logits of its own classes. Of those it
needs two numbers an item from the others, a maximum and a sum, and the target's logit from the rank
that has it: one all-gather at the end of forward. Backward computes the logits again; gradients of
weight and bias stay where the classes are, that of the input is a sum over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern._launch import exact_add, in_huge_pages
from mbkern._linear_call import Gradients, LinearCall
from mbkern._linear_rows import LIMBS
from mbkern._linear_stats import LinearStats, cap_slope, capped, class_or_0, log_prob
from mbkern._tensors import on_cuda

_BLOCK_BYTES = 2 << 20  # of float32 logits at once: they stay in the cache
_BLOCK_BYTES_CUDA = 64 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """Which classes this rank has.

    Attributes:
        group: the process group over which the vocabulary is cut.
        sizes: how many classes each rank has, in the order of the ranks.
    """

    group: Any
    sizes: tuple[int, ...]

    @property
    def first(self) -> int:
        """The number of this rank's first class."""
        return sum(self.sizes[: torch.distributed.get_rank(self.group)])

    @property
    def total(self) -> int:
        """The number of classes of all ranks."""
        return sum(self.sizes)


@dataclass(slots=True)
class Items:
    """Of every item, (n): float64: what all ranks know after the exchange.

    Attributes:
        max: of the logits of all classes, m.
        rest: sum of exp(c_j - m) over all classes but the target.
        logit: the target's, c_t.
        distance: sum of w_j (m - c_j); with label smoothing only.
        uncapped: the target's logit before the soft cap; where backward starts from it.
    """

    max: Tensor
    rest: Tensor
    logit: Tensor
    distance: Tensor | None = None
    uncapped: Tensor | None = None

    def saved(self) -> Tensor:
        """What backward needs, (3, n)."""
        logit = self.logit if self.uncapped is None else self.uncapped
        return torch.stack((self.max, self.rest, logit))


class ShardCall(LinearCall):
    """A call of the head that has the classes of one rank; class weights are of all classes."""

    def __init__(self, *args: Any, shard: Shard) -> None:
        self.shard = shard
        super().__init__(*args)
        rows = self.options.row
        all_weights = None if rows.weight is None else rows.weight.detach().to(self.compute)
        self._all_weights = all_weights
        self._weights = torch.ones(self.classes, dtype=self.compute, device=self.x.device)
        if all_weights is not None:
            self._weights = all_weights[shard.first : shard.first + self.classes]
        self._weight_sum = (
            float(shard.total) if all_weights is None else all_weights.sum(dtype=torch.float64)
        )
        self._keep_share = 1.0 - rows.label_smoothing
        self._spread_share = rows.label_smoothing / max(1, shard.total)
        target = self.target.reshape(-1)
        self._counts = target != rows.ignore_index
        if self._all_weights is None:
            self._target_weight = torch.ones_like(target, dtype=torch.float64)
        else:
            self._target_weight = self._all_weights[class_or_0(target, shard.total)].double()
        self._bad = self._counts & (class_or_0(target, shard.total) != target)

    def _number_of_classes(self) -> int:
        return self.shard.total

    def _term(self, items: Items) -> Tensor:
        """exp(c_t - m)."""
        return torch.exp(items.logit - items.max)

    def _log_sum(self, items: Items) -> Tensor:
        """log of the sum of all exp(c_j - m); exact where the target is nearly certain."""
        term, rest = self._term(items), items.rest
        return torch.log1p(torch.where(term == 1.0, rest, (rest - 1.0) + term))

    def _or_nan(self, logit: Tensor) -> Tensor:
        """Targets' logits, NaN where a target is no class: no rank has it, and on CUDA no host has
        asked."""
        return logit.masked_fill(self._bad, torch.nan)

    # ---- forward ----

    def exchange(self, with_stats: bool) -> tuple[Items, LinearStats | None]:
        """Compute all logits, and tell and learn what the ranks have found.

        Returns:
            What is known of every item, and statistics of all items, if asked for; its ``lse`` is
            (n), of the rows that are computed.
        """
        smoothing = self._spread_share != 0
        kinds = 3 + smoothing + with_stats
        n = self.count * self.items
        # Largest logit, sum without the target's term, target's logit; distances of smoothing; the
        # entropy's sum.
        found = torch.zeros((kinds, n), dtype=self.compute, device=self.x.device)
        best = torch.zeros(n if with_stats else 0, dtype=torch.int64, device=self.x.device)
        for rows, part, here, index in self._blocks():
            at = slice(rows.start * self.items, rows.stop * self.items)
            c = capped(part.to(self.compute), self.options.row.softcap)
            values = self._statistics(c, here, index, smoothing, with_stats)
            found[: len(values), at] = torch.stack(values).flatten(1)
            if with_stats and self.classes:
                best[at] = (c.argmax(1) + self.shard.first).flatten()
        ranks = all_gather(found, self.shard.group).double()
        items, weights = self._combine(ranks, smoothing)
        if not with_stats:
            return items, None
        classes = all_gather(best, self.shard.group)
        first = ranks[:, 0].nan_to_num(nan=torch.inf).argmax(0)  # the lowest rank of equals
        predicted = classes.gather(0, first.unsqueeze(0)).squeeze(0)
        sums = ((ranks[:, -1] + _times(ranks[:, 1], ranks[:, 0] - items.max)) * weights).sum(0)
        return items, self._stats(items, predicted, sums)

    def _statistics(
        self, c: Tensor, here: Tensor, index: Tensor, smoothing: bool, with_stats: bool
    ) -> list[Tensor]:
        """Of a block (rows, classes, inner) of capped logits, each (rows, inner)."""
        low = torch.full_like(here, -torch.inf, dtype=self.compute)
        top = c.amax(1) if self.classes else low
        base = top.masked_fill(top == -torch.inf, 0)
        distance = c - base.unsqueeze(1)
        e = torch.exp(distance)
        logit = low
        if self.classes:
            logit = torch.where(here, c.gather(1, index).squeeze(1), low)
            e.scatter_(1, index, torch.where(here.unsqueeze(1), 0, e.gather(1, index)))
        values = [top, e.sum(1), logit]
        if smoothing:
            values.append(-(distance * self._weights.view(1, -1, 1)).sum(1))
        if with_stats:
            values.append(torch.where(e == 0, 0, e * distance).sum(1))
        return values

    def _combine(self, ranks: Tensor, smoothing: bool) -> tuple[Items, Tensor]:
        """From (ranks, kinds, n); also each rank's exp(its maximum - the maximum)."""
        top, rest, logit = ranks[:, 0], ranks[:, 1], ranks[:, 2].amax(0)
        largest = top.amax(0)
        weights = torch.exp(top - largest)
        items = Items(largest, (rest * weights).sum(0), self._or_nan(logit))
        if smoothing:
            of_class = self._all_weights
            if of_class is None:
                of_class = torch.ones(self.shard.total, dtype=self.compute, device=self.x.device)
            of_rank = [
                w.sum(dtype=torch.float64) for w in torch.split(of_class, list(self.shard.sizes))
            ]
            shift = torch.stack(of_rank).unsqueeze(1)
            base = top.masked_fill(top == -torch.inf, 0)
            items.distance = (ranks[:, 3] + _times(shift, largest - base)).sum(0)
        return items, weights

    def _stats(self, items: Items, predicted: Tensor, sums: Tensor) -> LinearStats:
        """As :func:`mbkern._linear_stats.gather`; (n) each."""
        counts, target = self._counts, self.target.reshape(-1)
        term, log_sum = self._term(items), self._log_sum(items)
        mass = items.rest + term
        entropy = log_sum - (sums + _times(term, items.logit - items.max)) / mass
        count = counts.sum()
        lse = torch.where(items.max.isinf(), items.max, items.max + log_sum)
        of_target = log_prob(items.logit - items.max, items.max, log_sum)
        return LinearStats(
            count, ((predicted == target) & counts).sum() / count,
            predicted.masked_fill(~counts, -1),
            of_target.masked_fill(~counts, 0).to(self.compute),
            entropy.masked_fill(~counts, 0).to(self.compute),
            lse.masked_fill(~counts, 0).to(self.compute),
        )  # fmt: skip

    def loss(self, items: Items, divisor: float | Tensor, dtype: torch.dtype) -> Tensor:
        """The reduced loss; or one an item."""
        rows, log_sum = self.options.row, self._log_sum(items)
        loss = self._target_weight * self._keep_share * ((items.max - items.logit) + log_sum)
        if items.distance is not None:
            loss = loss + self._spread_share * (self._weight_sum * log_sum + items.distance)
        if rows.z_loss:
            loss = loss + rows.z_loss * (items.max + log_sum) ** 2
        if self.sample_weight is not None:
            loss = loss * self.sample_weight.reshape(-1)
        loss = loss.masked_fill(~self._counts, 0).to(self.compute)
        total = None
        if rows.reduction == "none":
            return self._loss([loss.view(-1, self.items)], total, divisor, dtype, None)
        if self.compute is torch.float64:
            mean = rows.reduction == "mean"
            return self._loss(
                [loss.sum() / divisor if mean else loss.sum()], None, 1.0, dtype, None
            )
        total = torch.zeros(LIMBS, dtype=torch.int64, device=self.x.device)
        exact_add(total, loss)
        return self._loss([], total, divisor, dtype, None)

    # ---- backward ----

    def gradients(
        self,
        into: Gradients,
        saved: Tensor,
        divisor: float | Tensor,
        scale: float | Tensor | None,
        item_scale: Tensor | None,
        of_lse: Tensor | None,
    ) -> None:
        """Add up the gradients of this rank's classes.

        Args:
            into: the gradients that are wanted; the input's is this rank's part of the sum.
            saved: of :meth:`Items.saved`.
            divisor: of a mean.
            scale, item_scale: multiply the loss; of a reduced one, and of one an item. Both None:
                the loss is not differentiated.
            of_lse: the incoming gradient of every item's log-sum-exp, (n), or None.
        """
        rows = self.options.row
        items = Items(*saved)
        number = self.options.logit_scale
        factor = torch.zeros_like(items.max)
        if scale is not None:
            factor = factor + scale / divisor
        if item_scale is not None:
            factor = factor + item_scale.reshape(-1)
        if self.sample_weight is not None:
            factor = factor * self.sample_weight.reshape(-1)
        certain = self._target_weight * self._keep_share
        pull = torch.zeros_like(items.max)
        if self._spread_share:  # or an infinite weight of another class would make it NaN
            pull = pull + self._spread_share * self._weight_sum
        if rows.z_loss:
            pull = pull + (2 * rows.z_loss) * (items.max + self._log_sum(items))
        term = self._term(items)
        mass = items.rest + term
        extra = torch.zeros_like(factor) if of_lse is None else of_lse.double()
        every = (factor * (certain + pull) + extra) / mass
        at_target = (factor * (pull * term - certain * items.rest) + extra * term) / mass
        if self._spread_share:
            at_target = at_target - factor * self._target_weight * self._spread_share
        even = factor * self._spread_share
        vectors = torch.stack((every, at_target, even)) * (1.0 if number is None else number)
        vectors = vectors.masked_fill(~self._counts, 0).to(self.compute)
        largest = items.max.to(self.compute)
        if self.classes == 0:
            if into.input is not None:
                into.input.zero_()
            return
        self.skip_below = 0.0
        if into.any() and of_lse is None:
            whole = 1.0 if scale is None else scale
            self.skip_below = self._filter(whole * (number or 1.0), item_scale, divisor)
        for rows_of, part, here, index in self._blocks(into):
            at = slice(rows_of.start * self.items, rows_of.stop * self.items)
            every, target, even = (v.view(-1, 1, self.items) for v in vectors[:, at])
            c = capped(part.to(self.compute), rows.softcap)
            g = torch.exp(c - largest[at].view(-1, 1, self.items)).mul_(every)
            if self._spread_share:
                g -= even * self._weights.view(1, -1, 1)
            g.scatter_(1, index, torch.where(here.unsqueeze(1), target, g.gather(1, index)))
            if rows.softcap is not None:
                g *= cap_slope(part.to(self.compute), rows.softcap)
            counts = self._counts[at].view(-1, 1, self.items)
            part.copy_(g.masked_fill_(~counts, 0))

    def _blocks(
        self, into: Gradients | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield rows, their logits (rows, classes, inner), whether the target is one of these
        classes, (rows, inner), and which, (rows, 1, inner).

        What the logits have been replaced by, chunk by chunk, goes ``into`` the gradients.
        """
        cuda = on_cuda(self.x)
        shape = (self.step, self.w.shape[0])
        memory = in_huge_pages(torch.empty(shape, dtype=self._memory_dtype, device=self.x.device))
        of_row = max(1, self.compute.itemsize * self.w.shape[0])
        step = max(1, (_BLOCK_BYTES_CUDA if cuda else _BLOCK_BYTES) // of_row)
        for first, end in self.chunks():
            x = self._inputs(first, end)
            z = self._logits(x, memory)
            logits = z.view(end - first, self.classes, self.items)
            for start in range(first, end, step):
                stop = min(start + step, end)
                here, index = self._targets(start, stop)
                yield slice(start, stop), logits[start - first : stop - first], here, index
            if into is not None:
                self._spread(x, z, first, end, into)

    def _targets(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Whether a target is one of these classes, (rows, inner), and which, (rows, 1, inner)."""
        target = self.target.view(-1, self.items)[first:end] - self.shard.first
        counts = self._counts.view(-1, self.items)[first:end]
        here = (target >= 0) & (target < self.classes) & counts
        return here, target.clamp(0, max(0, self.classes - 1)).unsqueeze(1)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b, and 0 where a is: b may be infinite there."""
    return torch.where(a == 0, 0.0, a * b)


def all_gather(values: Tensor, group: Any) -> Tensor:
    """(ranks, *shape), of tensors of one shape; nothing is sent of empty ones."""
    world = torch.distributed.get_world_size(group)
    if values.numel() == 0:
        return values.new_empty((world, *values.shape))
    found = [torch.empty_like(values) for _ in range(world)]
    torch.distributed.all_gather(found, values.contiguous(), group=group)
    return torch.stack(found)
