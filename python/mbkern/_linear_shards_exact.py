"""The fused head over a cut vocabulary, split-invariant: the bits of one process.

What a row of logits is summed up to is defined in csrc/core/row_items.h: exponentials of the
distance to the maximum, by blocks of columns, their sums joined exactly. Ranks that begin at a
block therefore tell each other first their maxima, then the sums of their blocks. The input's
gradient, a sum over blocks of classes in order, goes from rank to rank: one computes after another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mbkern import _C
from mbkern import _launch_product as products
from mbkern._elementary import elementary
from mbkern._launch import RowCall, converted, in_huge_pages
from mbkern._linear_call import _NUMBER, Gradients
from mbkern._linear_shards import Items, Shard, ShardCall, all_gather
from mbkern._linear_stats import LinearStats

_LEVEL = 38  # bits of a digit in an exact sum: 5 of them reach from 2^18 to the smallest float32
_IGNORED = -1


class ExactShardCall(ShardCall):
    """A split-invariant call of the head that has the classes of one rank."""

    def __init__(self, *args: Any, shard: Shard) -> None:
        super().__init__(*args, shard=shard)
        rows = self.options.row
        for name, given in (
            ("label_smoothing", rows.label_smoothing != 0), ("weight", rows.weight is not None),
            ("a tensor as logit_scale", self.scale is not None),
        ):  # fmt: skip
            if given:
                raise NotImplementedError(
                    f"mbkern: split_invariant=True over several processes does not go with {name}"
                )
        first = 0
        for rank, size in enumerate(shard.sizes):
            if size and first % _C.ROW_BLOCK:
                raise ValueError(
                    f"mbkern: split_invariant=True over several processes: the classes of rank "
                    f"{rank} begin at {first}, which is not a multiple of {_C.ROW_BLOCK}; the "
                    f"ranks have {', '.join(map(str, shard.sizes))}"
                )
            first += size

    def _rows_of_chunk(self) -> int:  # the same on all ranks
        return self._rows_for(max(self.shard.sizes) * self.items)

    # ---- forward ----

    def exchange(self, with_stats: bool) -> tuple[Items, LinearStats | None]:
        """Compute all logits, and tell and learn what the ranks have found."""
        if with_stats:
            raise NotImplementedError(
                "mbkern: split_invariant=True over several processes does not go with return_stats"
            )
        n = self.count * self.items
        found = torch.empty((3, n), dtype=self.compute, device=self.x.device)
        memory = self._memory()
        for first, end in self.chunks():
            at = slice(first * self.items, end * self.items)
            z = self._chunk(first, end, memory)[:, : self.classes]
            c = self._capped(z)
            here, index = self._targets(first, end)
            low = torch.full_like(here, -torch.inf, dtype=self.compute)
            top = c.amax(1) if self.classes else low
            logit = torch.where(here, z.gather(1, index).squeeze(1), low) if self.classes else low
            top, logit = all_gather(torch.stack((top, logit)), self.shard.group).amax(0)
            top = top + 0.0  # a maximum of -0 is that of +0
            e = elementary("exp_nonpositive", c - top.unsqueeze(1))
            if self.classes:
                e.scatter_(1, index, torch.where(here.unsqueeze(1), 0, e.gather(1, index)))
            rest = self._sum(self._sums_of_blocks(e))
            rest = torch.where(top.isfinite(), rest, torch.nan)
            found[:, at] = torch.stack((top, rest, logit)).flatten(1)
        found[2] = self._or_nan(found[2])
        top, rest, logit = found.double()
        capped = self._capped(found[2].clone()).double()
        return Items(top, rest, capped, uncapped=logit), None

    def _capped(self, z: Tensor) -> Tensor:
        cap = self.options.row.softcap
        if cap is None:
            return z
        return elementary("tanh", z * _rounded(1.0 / cap, z)) * _rounded(cap, z)

    def _sums_of_blocks(self, e: Tensor) -> Tensor:
        """(rows, inner, blocks) of all ranks, of (rows, classes, inner) terms of this one."""
        blocks = [-(-size // _C.ROW_BLOCK) for size in self.shard.sizes]
        rows, _, inner = e.shape
        most, lanes = max(blocks), _C.ROW_LANES
        padded = e.new_zeros((rows, most * _C.ROW_BLOCK, inner))
        padded[:, : e.shape[1]] = e
        columns = padded.view(rows, most, _C.ROW_BLOCK // lanes, lanes, inner)
        sums = columns[:, :, 0]
        for k in range(1, columns.shape[2]):  # each lane adds its columns in order
            sums = sums + columns[:, :, k]
        while sums.shape[2] > 1:  # lanes are joined by halves
            half = sums.shape[2] // 2
            sums = sums[:, :, :half] + sums[:, :, half:]
        ranks = all_gather(sums.squeeze(2), self.shard.group)
        parts = [part[:, :count] for part, count in zip(ranks, blocks, strict=True)]
        return torch.cat(parts, 1).movedim(1, -1)

    def _sum(self, blocks: Tensor) -> Tensor:
        if self.compute is torch.float32:
            return exact_sum(blocks)
        total = blocks[..., 0]
        for k in range(1, blocks.shape[-1]):
            total = total + blocks[..., k]
        return total

    def _term(self, items: Items) -> Tensor:
        distance = items.logit.to(self.compute) - items.max.to(self.compute)
        return elementary("exp_nonpositive", distance).double()

    def _log_sum(self, items: Items) -> Tensor:
        term, rest = self._term(items), items.rest
        return elementary("log1p", torch.where(term == 1.0, rest, (rest - 1.0) + term))

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
        """Add up the gradients of this rank's classes; the input's is that of all ranks."""
        rows = self.options.row
        if self.options.logit_scale is not None:  # from the logits' gradient to the product's
            scale = 1.0 if scale is None else scale
            wide = scale.double() if isinstance(scale, Tensor) else scale
            scale = wide * self.options.logit_scale
        largest, rest, logit = saved.to(self.compute)
        total = self._receive() if into.input is not None else None
        memory = self._memory()
        own = Gradients(None, into.weight, into.bias, None)
        for first, end in self.chunks() if self.classes else ():
            at = slice(first * self.items, end * self.items)
            logits = self._chunk(first, end, memory)
            here, index = self._targets(first, end)
            counts = self._counts[at].view(here.shape)
            # A target of another rank is a class behind this rank's: one more logit.
            logits[:, -1] = logit[at].view(here.shape)
            target = torch.where(here, index.squeeze(1), self.classes)
            target = target.masked_fill(~counts, _IGNORED)
            weights = self.sample_weight
            if weights is not None:
                weights = weights[first:end].view(here.shape)
            options = replace(
                rows, weight=None, sample_weight=weights, ignore_index=_IGNORED, denominator=None
            )
            call = RowCall(_NUMBER, logits, target, options)
            call.run(
                scale=1.0 if scale is None else scale, loss_dtype=self.compute, grad=logits,
                item_scale=None if item_scale is None else item_scale[first:end].view(here.shape),
                state=torch.stack((largest[at], rest[at])), from_state=True, divisor=divisor,
            )  # fmt: skip
            g = logits[:, : self.classes].reshape(end - first, -1)
            self._spread(self._inputs(first, end), g, first, end, own)
            if total is not None:
                products.product(total[first:end], g.t(), self.w, products.BLOCKS)
        if total is not None and into.input is not None:
            self._pass_on(total)
            self._keep(converted(total, into.input.dtype), 0, self.count, into.input)

    def _receive(self) -> Tensor:
        """The sum of the ranks before this one."""
        group, rank = self.shard.group, torch.distributed.get_rank(self.shard.group)
        shape = (self.count, self.w.shape[1])
        total = torch.zeros(shape, dtype=self.compute, device=self.x.device)
        if rank > 0 and total.numel():
            torch.distributed.recv(total, _global_rank(group, rank - 1), group=group)
        return total

    def _pass_on(self, total: Tensor) -> None:
        """To the next rank; and get the sum of all."""
        group, rank = self.shard.group, torch.distributed.get_rank(self.shard.group)
        last = torch.distributed.get_world_size(group) - 1
        if not total.numel():
            return
        if rank < last:
            torch.distributed.send(total, _global_rank(group, rank + 1), group=group)
        torch.distributed.broadcast(total, _global_rank(group, last), group=group)

    # ---- chunks ----

    def _memory(self) -> Tensor:
        """(rows, classes + 1, inner): a column for the target of another rank."""
        shape = (self.step, self.classes + 1, self.items)
        return in_huge_pages(torch.empty(shape, dtype=self.logits_dtype, device=self.x.device))

    def _chunk(self, first: int, end: int, memory: Tensor) -> Tensor:
        rows = memory[: end - first]
        flat = rows.view(end - first, -1)[:, : self.classes * self.items]
        self._logits(self._inputs(first, end), flat)
        return rows


def exact_sum(values: Tensor) -> Tensor:
    """Sums of non-negative float32 numbers below 2^17 along the last dimension, rounded once.

    Digits of 38 bits, from that of the largest number on, are added as integers; below the highest
    only whether anything is there matters, for a number that lies half-way between two others.
    """
    _, exponent = torch.frexp(values.amax(-1))
    rest, digits = values.double(), []
    for level in range(1, 6):
        unit = torch.exp2((exponent - _LEVEL * level).double()).unsqueeze(-1)
        digit = torch.floor(rest / unit)
        digits.append(digit.long().sum(-1))
        rest = rest - digit * unit
    for k in range(len(digits) - 1, 0, -1):
        digits[k - 1] += digits[k] >> _LEVEL
        digits[k] &= (1 << _LEVEL) - 1
    sticky = torch.stack(digits[1:]).any(0)
    highest = (digits[0] | sticky.long()).float()
    return (highest.double() * torch.exp2((exponent - _LEVEL).double())).float()


def _rounded(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _global_rank(group: Any, rank: int) -> int:
    return torch.distributed.get_global_rank(group, rank)
