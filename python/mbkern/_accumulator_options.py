"""What an accumulator is asked to do, read and checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbkern._accumulator_flush import INTO
from mbkern._accumulator_parameters import penalty

_MODES = ("deferred", "streaming", "known")
_LAYOUTS = ("flat", "parameter")
_SPARSE = ("error", "densify")
_COMPENSATIONS = ("kahan", "stochastic")


@dataclass(frozen=True)
class Options:
    """The constructor's arguments of these names; see there."""

    dtype: torch.dtype
    layout: str
    mode: str
    compensation: str | None
    seed: int
    denominators: Sequence[str]
    l1: float
    l2: float
    into: str
    pre_scale: float
    sparse: str
    measure: bool
    noise_scale: bool

    def __post_init__(self) -> None:
        """Raise for what is not known or does not go together."""
        for value, name, allowed in (
            (self.mode, "mode", _MODES),
            (self.layout, "layout", _LAYOUTS),
            (self.sparse, "sparse", _SPARSE),
            (self.into, "into", INTO),
        ):
            if value not in allowed:
                raise ValueError(f"mbkern: {name} must be one of {', '.join(allowed)}: {value!r}")
        if not (self.pre_scale > 0 and math.frexp(self.pre_scale)[0] == 0.5):
            raise ValueError(
                f"mbkern: pre_scale is {self.pre_scale}; it must be positive and finite, a power "
                "of two: others are rounded to a 16-bit loss's dtype"
            )
        names = self.denominators
        # Not a set: its order is another in each process.
        several = isinstance(names, Sequence) and not isinstance(names, str)
        words = several and all(isinstance(name, str) for name in names)
        if not words or len(set(names)) != len(names):
            raise ValueError(
                f"mbkern: denominators must be a sequence of different names, not {names!r}"
            )
        penalty(self.l1, "l1")
        penalty(self.l2, "l2")
        self._check_dtype()
        self._check_noise_scale()

    def _check_dtype(self) -> None:
        if self.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"mbkern: dtype is {self.dtype}; buffers are float32, float64 or bfloat16"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"mbkern: seed is {self.seed}; it must be in [0, 2^64)")
        if self.dtype != torch.bfloat16:
            if self.compensation is not None:
                raise ValueError(
                    f"mbkern: compensation={self.compensation!r} is for dtype=torch.bfloat16; "
                    f"buffers of {self.dtype} need none"
                )
            return
        if self.compensation not in _COMPENSATIONS:
            raise ValueError(
                "mbkern: buffers of bfloat16 lose what is added to a larger sum; compensation must "
                f"be one of {', '.join(_COMPENSATIONS)}, not {self.compensation!r}"
            )
        if self.sets > 1:
            raise ValueError(
                f"mbkern: bfloat16 buffers serve one denominator, not {len(self.names)}; "
                "mode='known' divides as gradients are added, and has one set of buffers"
            )
        if self.into == "fp32_grad":
            raise ValueError("mbkern: into='fp32_grad' needs float32 buffers, not bfloat16")

    def _check_noise_scale(self) -> None:
        if self.noise_scale and (self.mode == "known" or self.sets > 1 or self.l1 or self.l2):
            raise ValueError(
                "mbkern: noise_scale=True needs one denominator, no penalty, and a mode other than "
                "'known'"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The denominators; one without a name if none was named."""
        return tuple(self.denominators) or ("",)

    @property
    def sets(self) -> int:
        """How many sets of buffers there are."""
        return 1 if self.mode == "known" else len(self.names)

    def set_of(self, denominator: str) -> int:
        """Which set of buffers a denominator's gradients are added to; raise for an unknown one."""
        if denominator not in self.names:
            raise ValueError(
                f"mbkern: denominator {denominator!r} is not declared: GradAccumulator(..., "
                f"denominators=...) has {[name for name in self.names if name]}"
            )
        return 0 if self.mode == "known" else self.names.index(denominator)

    @property
    def measures(self) -> bool:
        """Whether the norms of micro-batches' gradients are wanted."""
        return self.measure or self.noise_scale


def require_scale(pre_scale: float, loss: Tensor) -> None:
    """Raise if a loss cannot be multiplied by it: in the loss's dtype it would be 0 or infinite."""
    if not loss.is_floating_point():
        return
    limits = torch.finfo(loss.dtype)
    if not limits.tiny * limits.eps <= pre_scale <= limits.max:
        raise ValueError(
            f"mbkern: pre_scale={pre_scale} is {'0' if pre_scale < 1 else 'infinite'} in the "
            f"loss's dtype, {loss.dtype}; give a loss of float32, or another pre_scale"
        )
