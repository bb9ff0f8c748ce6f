"""What is known of a window besides its sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from mbkern._accumulator_collect import Measurement
from mbkern._accumulator_counts import Count, reciprocal
from mbkern._accumulator_options import Options
from mbkern._accumulator_sharded import Kept
from mbkern._arguments import Number


@dataclass
class Window:
    """From one flush to the next.

    Attributes:
        micro_batches: how many were added.
        counts: for each denominator, what was counted.
        totals: what ``begin`` announced.
        omitted: denominators of micro-batches that gave no count.
        measurements: norms of micro-batches' gradients.
        sizes: by micro-batch, what it counted.
        measured_whole: whether every gradient was measured.
        repeated: whether a parameter had two gradients in one micro-batch.
        lent: buffers that kernels may add to, and their versions before.
        kept: what FSDP kept of gradients after the last micro-batch.
        divisor: what FSDP divided by.
        broken: why the window is refused.
        failed: of the micro-batch that was added in part, its denominator and the count with it.
    """

    micro_batches: int = 0
    counts: dict[str, Count] = field(default_factory=dict)
    totals: dict[str, Number] | None = None
    omitted: set[str] = field(default_factory=set)
    measurements: list[Measurement] = field(default_factory=list)
    sizes: dict[int, Number] = field(default_factory=dict)
    measured_whole: bool = True
    repeated: bool = False
    lent: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    kept: Kept = ()
    divisor: float | None = None
    broken: str | None = None
    failed: tuple[str, Count] | None = None

    def require_whole(self) -> None:
        """Raise if a micro-batch was added in part, or sums were divided in part."""
        if self.broken:
            or_keep = ", keep_partial() goes on with it" if self.failed else ""
            raise RuntimeError(f"mbkern: {self.broken}; reset() drops the window{or_keep}")

    def factor(self, denominator: str, options: Options) -> Number:
        """What gradients are multiplied by as they are added."""
        if options.mode != "known":
            return 1.0 / options.pre_scale
        if self.totals is None:
            raise RuntimeError("mbkern: mode='known' needs begin(total=...) before each window")
        return reciprocal(self.totals[denominator]) / options.pre_scale

    def require_divisor(self, now: float) -> None:
        """Raise if FSDP divides by another factor than in the window's first micro-batch."""
        if self.divisor not in (None, now):
            raise RuntimeError(
                f"mbkern: FSDP divides gradients by {now:g} now, and divided by {self.divisor:g} "
                "earlier in this window; set it back, or reset() drops the window"
            )
        self.divisor = now

    def keep_partial(self) -> None:
        """Take the micro-batch that was added in part for whole: its items count."""
        if self.failed is None:
            self.require_whole()
        else:
            name, counted = self.failed
            self.counts[name] = counted
            self.micro_batches += 1
            self.measured_whole = False
        self.broken = self.failed = None

    def check_totals(self) -> None:
        """Raise if what was announced is not what was counted, where both are numbers."""
        for name, count in self.counts.items():
            announced = (self.totals or {}).get(name)
            if announced is None or isinstance(announced, Tensor) or count.tensor is not None:
                continue
            if name in self.omitted or not count.number:
                continue
            if not math.isclose(count.number, announced, rel_tol=1e-6):  # sums of weights round
                raise ValueError(
                    f"mbkern: begin() announced a total of {announced}{name and f' {name}'}, and "
                    f"{count.number} were counted; reset() drops the window"
                )
