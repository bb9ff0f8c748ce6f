"""How large a mini-batch is worth averaging: the gradient noise scale.

Method: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (2018),
appendix A. Let G be the gradient's expectation and S the trace of its covariance for one item. A
mean over n items has E|g|^2 = |G|^2 + S / n, so the squared norms of the micro-batches' means and
that of the window's give two equations::

    mean_i |g_i / n_i|^2 = |G|^2 + S mean_i (1 / n_i),    |sum_i g_i / N|^2 = |G|^2 + S / N

Both solutions are unbiased; their quotient is not, so each is averaged over windows first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mbkern._accumulator_counts import as_count
from mbkern._arguments import Number
from mbkern._losses import as_number
from mbkern._tensors import describe


def _beside(like: Tensor, number: Number) -> Tensor:
    """A number as a 0-dim tensor; one of the host's is filled in, as a copy would be waited for."""
    if isinstance(number, Tensor) and not number.is_cpu:
        return number.detach().to(like)
    return torch.full_like(like, float(number))


def _as_number(number: Any, name: str) -> Number:
    one = isinstance(number, Tensor) and number.numel() == 1
    return as_count(number.detach().reshape(()) if one else number, name)


def _as_square(norm: Any) -> Tensor:
    if not isinstance(norm, Tensor):
        raise TypeError(f"mbkern: a squared norm is a tensor, not {type(norm).__name__}")
    if norm.numel() != 1 or norm.is_complex() or norm.is_meta:
        raise ValueError(f"mbkern: a squared norm is a real 0-dim tensor, not {describe(norm)}")
    return norm.detach().reshape(())


def in_whole_items(scale: Tensor) -> Tensor:
    """A noise scale as a batch: at least 1; NaN where an estimate is not positive."""
    return torch.where(scale > 0, scale.ceil(), float("nan"))


class NoiseScale:
    """Running estimate of the gradient noise scale; its state lies on the gradients' device.

    Args:
        decay: of the running averages over windows, in [0, 1): 0.99 remembers about 100.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = as_number(decay, "decay")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"mbkern: decay must be in [0, 1), not {decay}")
        self._sums: Tensor | None = None  # of |G|^2, S and the weights of the average

    def update(self, squared_norms: Sequence[Tensor], counts: Sequence[Number],
               total_squared_norm: Tensor, total: Number) -> None:  # fmt: skip
        """Take a window in.

        Args:
            squared_norms: 0-dim, of each micro-batch's summed gradient.
            counts: items of each micro-batch; micro-batches without items are left out.
            total_squared_norm: 0-dim, of the window's mean gradient, without penalties.
            total: items of the window.

        Raises:
            ValueError: norms and counts of different numbers of micro-batches, a norm that is not
                one number, a count that is none.
            TypeError: a squared norm that is no tensor.
        """
        if len(squared_norms) != len(counts):
            raise ValueError(
                f"mbkern: squared norms of {len(squared_norms)} micro-batches, and counts of "
                f"{len(counts)}"
            )
        like = _as_square(total_squared_norm).double()
        squares = [_as_square(norm).to(like) for norm in squared_norms]
        sizes = [_as_number(count, "count") for count in counts]
        big = _beside(like, _as_number(total, "total"))
        if not squares:
            return
        small = torch.stack(squares)
        n = torch.stack([_beside(like, size) for size in sizes])
        there = n > 0
        inverse = torch.where(there, 1 / n, 0.0)
        number = there.sum()
        mean_square = (small * inverse.square()).sum() / number
        mean_inverse = inverse.sum() / number
        variance = (mean_square - like) / (mean_inverse - 1 / big)
        square = like - variance / big
        # A window of one micro-batch says nothing, nor does one that is not finite.
        good = (number > 1) & torch.isfinite(variance) & torch.isfinite(square)
        new = torch.stack([square, variance, torch.ones_like(square)])
        old = torch.zeros_like(new) if self._sums is None else self._sums
        mixed = self.decay * old + (1 - self.decay) * new
        self._sums = torch.where(good, mixed, old)

    @property
    def squared_gradient(self) -> Tensor:
        """0-dim float64: the estimate of |G|^2; NaN before the first window."""
        return self._average(0)

    @property
    def variance(self) -> Tensor:
        """0-dim float64: the estimate of S, the trace of one item's covariance."""
        return self._average(1)

    @property
    def noise_scale(self) -> Tensor:
        """0-dim float64: S / |G|^2, in items: a mini-batch much smaller wastes steps, one much
        larger wastes items. At this size a step makes half the progress of the largest. Negative
        or NaN while it is not known: estimates of S and |G|^2 may both fall below 0, and then
        their quotient says nothing."""
        square, variance = self._average(0), self._average(1)
        return torch.where((square < 0) & (variance < 0), float("nan"), variance / square)

    @property
    def suggested_batch(self) -> Tensor:
        """0-dim float64: the noise scale in whole items, at least 1; NaN while it is not known."""
        return in_whole_items(self.noise_scale)

    def _average(self, which: int) -> Tensor:
        if self._sums is None:
            return torch.full((), float("nan"), dtype=torch.float64)
        return self._sums[which] / self._sums[2]

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"sums": None if self._sums is None else self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Raises:
            TypeError: no dict, or averages that are no tensor.
            ValueError: no state of a NoiseScale.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"mbkern: the state of a NoiseScale is a dict, not {type(state).__name__}"
            )
        if "sums" not in state:
            raise ValueError(f"mbkern: no state of a NoiseScale: it has no 'sums' but {[*state]}")
        sums = state["sums"]
        if sums is not None:
            if not isinstance(sums, Tensor):
                raise TypeError(
                    f"mbkern: the sums of a NoiseScale are a tensor, not {type(sums).__name__}"
                )
            if sums.shape != (3,) or not sums.is_floating_point() or sums.is_meta:
                raise ValueError(
                    f"mbkern: the sums of a NoiseScale are (3,) float64, not {describe(sums)}"
                )
            sums = sums.detach().to(torch.float64, copy=True)
        self._sums = sums

    def __repr__(self) -> str:
        return f"NoiseScale({self.noise_scale.item():.4g} items, decay={self.decay})"
