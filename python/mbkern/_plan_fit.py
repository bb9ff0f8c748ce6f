"""From a few measured micro-batches to all sizes: time, memory, and which size to take.

Memory. At any moment of a pass the live blocks are some that do not depend on the micro-batch and
some that grow with it, so the peak over n items is p(n) = max over moments of (a + b n), with a and
b at least 0. It follows that p(m) <= (m / n) p(n) for m > n: a bound that needs no fit, so that the
next size can be tried without running out. A pass that pairs its items with each other has a term
in n^2 as well: once three sizes show one, their parabola is the bound where it is larger.

Time. t(n) = overhead + n * seconds an item, roughly: caches, threads and padding of vectors bend
it. Between measured sizes it is interpolated, beyond them the last two measured sizes' line goes
on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NOISE = 1.33  # a peak of resident memory may have been measured that much too small
SMALLEST = 1 << 20  # a peak that is certainly not overestimated
SHARES = {"throughput": 0.985, "memory": 0.8}  # of the best throughput that must be reached


@dataclass(frozen=True)
class Probe:
    """What was measured with a micro-batch; the largest of all ranks.

    Attributes:
        items: of the micro-batch.
        function_s: seconds of a forward pass without gradients; NaN where that cannot be told.
        gradient_s: seconds of a forward and a backward pass.
        function_bytes: peak memory above what is held before a pass; NaN where it cannot be told.
        gradient_bytes: the same.
    """

    items: int
    function_s: float
    gradient_s: float
    function_bytes: float
    gradient_bytes: float


class Curve:
    """Times and peaks for all sizes, from those of some."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = sorted(probes, key=lambda probe: probe.items)
        self._n = np.array([probe.items for probe in self.probes], dtype=np.float64)

    def without(self, items: int) -> Curve:
        """The same, had that size not been measured."""
        return Curve([probe for probe in self.probes if probe.items != items])

    def seconds(self, items: float, what: str = "gradient_s") -> float:
        """Expected time of a pass."""
        times = np.array([getattr(probe, what) for probe in self.probes])
        if len(times) == 1:
            return float(times[0] * items / self._n[0])
        n = self._n
        if items > n[-1]:
            return float(max(times[-1], _line(items, n[-2:], times[-2:])))
        if items < n[0]:
            return float(max(times[0] * items / n[0], _line(items, n[:2], times[:2])))
        return float(np.interp(items, n, times))

    def window(self, batch: int, micro_batch: int, what: str = "gradient_s") -> float:
        """Expected time of all passes of a batch."""
        full, tail = divmod(batch, micro_batch)
        return full * self.seconds(micro_batch, what) + (self.seconds(tail, what) if tail else 0.0)

    def peak(self, items: float) -> float:
        """Expected peak of a gradient pass above what is held, in bytes."""
        peaks = np.maximum.accumulate([probe.gradient_bytes for probe in self.probes])
        if len(peaks) == 1:
            return float(peaks[0] * max(1.0, items / self._n[0]))
        if items <= self._n[-1]:
            return float(np.interp(items, self._n, peaks))
        fixed, slope = line_through(self._n[-3:], peaks[-3:])
        return float(max(peaks[-1], fixed + slope * items))

    def bound(self, items: int) -> float:
        """What a gradient pass surely stays below; ``items`` are at least the largest measured."""
        p = np.maximum([probe.gradient_bytes for probe in self.probes], SMALLEST)
        n = self._n
        most = p[-1] * items / n[-1]
        if len(p) > 1 and (more := p[-1] / n[-1] - p[-2] / n[-2]) > 0:
            # Above proportion, so there is a square: p = b n + c n^2 through both.
            most += items * (items - n[-1]) * more / (n[-1] - n[-2])
        if len(p) > 2:
            parabola = np.polyfit(n[-3:], p[-3:], 2)
            if parabola[0] > 0:
                most = max(most, float(np.polyval(parabola, items)))
        return float(most * NOISE)

    def time_line(self, what: str = "gradient_s") -> tuple[float, float]:
        """Seconds of overhead, and seconds an item, by least squares of the relative error."""
        times = np.array([getattr(probe, what) for probe in self.probes])
        return line_through(self._n, times, 1 / times)

    def memory_line(self) -> tuple[float, float]:
        """Bytes above what is held of no items, and bytes an item, by least squares."""
        return line_through(self._n, np.array([probe.gradient_bytes for probe in self.probes]))


def _line(at: float, x: np.ndarray, y: np.ndarray) -> float:
    return float(y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0]))


def line_through(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None
) -> tuple[float, float]:
    """Intercept and slope by least squares, neither negative."""
    w = np.ones_like(x) if weight is None else weight
    if len(x) > 1:
        slope, fixed = np.polyfit(x, y, 1, w=w)
        if slope >= 0 and fixed >= 0:
            return float(fixed), float(slope)
        if slope < 0:
            return float(np.average(y, weights=w * w)), 0.0
    return 0.0, float((w * w * x * y).sum() / (w * w * x * x).sum())


def candidates(batch: int, most: int, least: int, measured: Sequence[int]) -> list[int]:
    """Sizes worth taking: the smallest for each number of passes, powers of two, measured ones.

    Args:
        batch: its items.
        most: no size above it.
        least: the smallest pass that works: of a whole micro-batch, and of the tail.
        measured: sizes that have been.
    """
    largest, root = min(most, batch), math.isqrt(batch)
    if largest < 1:
        return []
    even = {-(-batch // passes) for passes in range(-(-batch // largest), root + 2)}
    even |= {*range(1, min(largest, root + 1) + 1), *(1 << k for k in range(largest.bit_length()))}
    sizes = even | set(measured)
    good = [n for n in sizes if least <= n <= largest]
    return sorted(n for n in good if batch % n == 0 or batch % n >= least)


def choose(curve: Curve, batch: int, sizes: Sequence[int], share: float) -> int:
    """The smallest size whose passes reach that share of the best throughput."""
    times = [curve.window(batch, n) for n in sizes]
    enough = min(times) / share
    return next(n for n, time in zip(sizes, times, strict=True) if time <= enough)


def progress(batch: float, noise_scale: float) -> float:
    """How far one step gets, against one with the true gradient, at the best learning rate each.

    1 / (1 + noise scale / batch): McCandlish et al. (2018), equation 2.6.
    """
    return 1 / (1 + noise_scale / batch)
