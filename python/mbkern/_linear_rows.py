"""The rows of the fused head that count: numbers, targets, weights, and the mean's divisor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbkern._arguments import compute_dtype, weights_as
from mbkern._launch import RowOptions, exact_add, exact_result, scalar_argument
from mbkern._linear_stats import class_or_0
from mbkern._tensors import on_cuda, require_plain

LIMBS = 12  # of an exact sum


@dataclass(slots=True)
class LinearOptions:
    """What the head is asked for, besides its tensors."""

    row: RowOptions
    logit_scale: float | None = None  # a number; a tensor is an argument of its own
    shift: int = 0
    chunk_bytes: int | None = None
    chunk_rows: int | None = None
    split_invariant: bool = False
    num_valid: int | None = None
    filter_eps: float = 0.0  # 0: nothing is left out


def per_item(weights: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast ``sample_weight`` to the shape of the unreduced loss, or raise."""
    try:
        return weights.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mbkern: sample_weight has shape {tuple(weights.shape)}, which does not "
            f"broadcast to the shape of the unreduced loss, {tuple(shape)}"
        ) from None


class LinearRows:
    """The flat input of one call of the head, and what is known of every row of it.

    Args:
        input: (*, in_features). shape: of the weight, (classes, *inner, in_features).
        target: class indices (*, *inner), or probabilities (*, classes, *inner).
        dtype: what the products are computed in: autocast's, or the operands' own.

    Attributes:
        x: (rows, in_features), all of them.
        rows: numbers in ``x`` of those that are computed; None: all.
        kept: their numbers in the unreduced loss; None: all.
        target, sample_weight: of those that are computed.
        shape: of the unreduced loss.
        has_index: whether targets are class indices.
    """

    def __init__(
        self, input: Tensor, shape: torch.Size, target: Tensor, options: LinearOptions,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.options, self.dtype = options, dtype
        self.target: Tensor
        self.sample_weight: Tensor | None
        self.classes, self.inner = shape[0], shape[1:-1]
        batch = input.shape[:-1]
        self.has_index = target.shape != (*batch, self.classes, *self.inner)
        x = require_plain(input.detach(), "input")
        self.x = x.reshape(math.prod(batch), input.shape[-1]).to(dtype)
        self.compute = compute_dtype(dtype)
        last = (batch[-1] - options.shift,) if options.shift else batch[-1:]
        self.shape = torch.Size((*batch[:-1], *last, *self.inner))
        self._select_rows(require_plain(target.detach(), "target"), batch)

    def _select_rows(self, target: Tensor, batch: torch.Size) -> None:
        """Set the rows' numbers in ``x`` (None: all) and in the loss, their targets and weights."""
        options = self.options
        columns = () if self.has_index else (self.classes,)
        inner = (self.items,) if self.inner else ()
        flat = target.reshape(self.x.shape[0], *columns, *inner)
        if self.has_index:  # or ignore_index would be compared in the target's own dtype, and wrap
            flat = flat.long()
        self.rows: Tensor | None = None
        if options.shift:
            length = batch[-1]
            starts = torch.arange(0, self.x.shape[0], length, device=self.x.device)
            within = torch.arange(length - options.shift, device=self.x.device)
            self.rows = (starts[:, None] + within).reshape(-1)
            flat = flat.index_select(0, self.rows + options.shift)
        if self.has_index:
            self._check_classes(flat)
        self.kept: Tensor | None = None
        if self.has_index and (not on_cuda(self.x) or options.num_valid is not None):
            counts = flat != options.row.ignore_index
            if self.inner:
                counts = counts.any(1)
            self.kept = self._kept(counts)
        weights = options.row.sample_weight
        if weights is not None:
            weights = self.of_kept(self._per_item(weights))
        if self.kept is not None:
            flat = flat.index_select(0, self.kept)
            self.rows = self.kept if self.rows is None else self.rows.index_select(0, self.kept)
        self.target, self.sample_weight = flat, weights

    def _per_item(self, weights: Tensor) -> Tensor:
        return per_item(weights_as(weights, "sample_weight", self.compute), self.shape)

    def _kept(self, counts: Tensor) -> Tensor | None:
        known = self.options.num_valid
        if on_cuda(counts):
            assert known is not None
            # Those that count first; then, if too few do, others, whose targets are ignored.
            return torch.sort(counts.byte(), descending=True, stable=True).indices[:known]
        number = int(torch.count_nonzero(counts))
        if known is not None and known != number:
            raise ValueError(f"mbkern: num_valid is {known}, and {number} targets are not ignored")
        return None if number == counts.numel() else torch.nonzero(counts).squeeze(1)

    def _check_classes(self, target: Tensor) -> None:
        """Raise before anything is written, where the host can see the targets."""
        if on_cuda(target) or target.numel() == 0:
            return
        t = target.reshape(-1)
        classes = self._number_of_classes()
        bad = ((t < 0) | (t >= classes)) & (t != self.options.row.ignore_index)
        if bool(bad.any()):
            at = int(torch.nonzero(bad)[0])
            raise IndexError(
                f"mbkern: target {int(t[at])} of item {at} is not a class in [0, {classes}) "
                f"and not ignore_index={self.options.row.ignore_index}"
            )

    def _number_of_classes(self) -> int:
        """How many classes targets are of."""
        return self.classes

    @property
    def count(self) -> int:
        """How many rows there are to compute."""
        return int(self.target.shape[0])

    @property
    def loss_rows(self) -> int:
        """How many rows the unreduced loss has, those that are not computed among them."""
        return math.prod(self.shape[: len(self.shape) - len(self.inner)])

    @property
    def items(self) -> int:
        """How many losses a row has."""
        return math.prod(self.inner)

    def of_kept(self, values: Tensor) -> Tensor:
        """One value an item of the unreduced loss, of the rows that are computed."""
        flat = values.to(self.compute).reshape(
            self.loss_rows, *((self.items,) if self.inner else ())
        )
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def divisor(self) -> float | Tensor:
        """What a mean divides by: given, or the sum of the weights of the items that count."""
        options = self.options.row
        if options.reduction != "mean":
            return 1.0
        if options.denominator is not None:
            given = scalar_argument(options.denominator, "denominator")
            if isinstance(given, Tensor):  # as it is now: backward is later
                return given.clone() if on_cuda(given) else float(given)
            return given
        weights = self.sample_weight
        if self.has_index:
            t = self.target
            ignored = t == options.ignore_index
            if options.weight is not None:
                of_class = options.weight.detach().to(self.compute)
                of_item = of_class[class_or_0(t, self._number_of_classes())]
                weights = of_item if weights is None else of_item * weights
            if weights is not None:
                weights = weights.masked_fill(ignored, 0)
            elif on_cuda(t):
                counted: Tensor = t.numel() - torch.count_nonzero(ignored).to(torch.float64)
                return counted
            else:
                return float(t.numel() - int(torch.count_nonzero(ignored)))
        if weights is None:
            return float(self.count * self.items)
        if self.compute is torch.float64:
            return weights.sum()
        total = torch.zeros(LIMBS, dtype=torch.int64, device=weights.device)
        exact_add(total, weights)  # in any order the same
        return exact_result(total, None, torch.float64)
