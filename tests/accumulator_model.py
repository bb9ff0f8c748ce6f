"""A model of a window of GradAccumulator, which adds the gradients up in fp64, with its bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

WIDE = torch.float64
# What one addition into a buffer may lose of the largest partial sum: a unit in the last place of
# the dtype; of a pair of bfloat16 2^-17; rounded by chance, a whole unit of bfloat16.
UNIT = {"fp32": 2.0**-24, "fp64": 2.0**-53, "kahan": 2.0**-16, "stochastic": 2.0**-7}
LAST = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, WIDE: 2.0**-53}


@dataclass
class Sums:
    """What the model knows of a parameter.

    Attributes:
        sums: of its gradients, one for each set of buffers; None where there was none.
        sizes: of the gradients' magnitudes, for the bound.
        added: how many gradients.
    """

    parameter: Tensor
    l1: float
    l2: float
    sums: list[Tensor | None]
    sizes: list[Tensor]
    added: int = 0

    def add(self, which: int, grad: Tensor, alpha: float) -> None:
        value = grad.detach().to(WIDE) * alpha
        before = self.sums[which]
        self.sums[which] = value if before is None else before + value
        self.sizes[which] = self.sizes[which] + value.abs()
        self.added += 1


@dataclass
class Noise:
    """The estimate of McCandlish et al., as mbkern.NoiseScale's docstring has it."""

    square: float = 0.0
    variance: float = 0.0
    weight: float = 0.0
    size: float = 0.0  # of what was subtracted, for the bound

    def update(self, norms: list[float], counts: list[float], big: float, total: float) -> None:
        pairs = [(a, n) for a, n in zip(norms, counts, strict=True) if n > 0]
        if len(pairs) < 2 or not all(map(math.isfinite, [*norms, big])):
            return
        mean_square = sum(a / n**2 for a, n in pairs) / len(pairs)
        inverse = sum(1 / n for _, n in pairs) / len(pairs) - 1 / total
        variance = (mean_square - big) / inverse
        self.square = 0.99 * self.square + 0.01 * (big - variance / total)
        self.variance = 0.99 * self.variance + 0.01 * variance
        self.weight = 0.99 * self.weight + 0.01
        self.size = 0.99 * self.size + 0.01 * (mean_square + big) * (1 + 1 / inverse)


@dataclass
class Model:
    """A window in fp64, and what outlives it."""

    of: dict[str, Sums]
    names: tuple[str, ...]
    known: bool
    counts: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    micro_batches: int = 0
    norms: list[float] = field(default_factory=list)  # squared, of each micro-batch
    sizes: list[float] = field(default_factory=list)  # what each counted
    measured: bool = True
    noise: Noise = field(default_factory=Noise)
    clipped: list[bool] = field(default_factory=list)

    def which(self, name: str) -> int:
        return 0 if self.known else self.names.index(name)

    def forget(self) -> None:
        for one in self.of.values():
            one.sums = [None] * len(one.sums)
            one.sizes = [torch.zeros((), dtype=WIDE)] * len(one.sums)
            one.added = 0
        self.counts, self.totals, self.micro_batches = {}, {}, 0
        self.norms, self.sizes, self.measured = [], [], True

    def received(self) -> list[str]:
        return [n for n, one in self.of.items() if any(s is not None for s in one.sums)]

    def gradient(self, name: str, scale: float, unit: float) -> tuple[Tensor, Tensor]:
        """The gradient before clipping, and what it may be off."""
        one = self.of[name]
        p = one.parameter.detach().to(WIDE)
        value = one.l2 * p + one.l1 * p.sign()
        size = value.abs()
        for k, sums in enumerate(one.sums):
            if sums is not None:
                total = 1.0 if self.known else self.counts.get(self.names[k], 0.0)
                factor = 0.0 if total == 0 else 1 / (total * scale)
                value, size = value + factor * sums, size + factor * one.sizes[k]
        # Each addition loses a unit of a partial sum, which is at most the sum of magnitudes; six
        # more for factors that are rounded, penalties and the sets' sums.
        return value, (one.added + 6) * unit * size

    def penalty(self) -> float:
        return sum(
            float(one.l1 * p.abs().sum() + one.l2 / 2 * p.square().sum())
            for one in (self.of[name] for name in self.received())
            for p in [one.parameter.detach().to(WIDE)]
        )
