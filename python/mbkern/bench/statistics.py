"""What is read off samples: order statistics and intervals between them, ratios, growth.

Nothing here assumes a distribution: times are skewed to the right, and often have two modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOISY = 0.10  # a distance of the quartiles above this share of the median is reported
RESAMPLES = 2000
MOST = 2000
LEVEL = 0.95
FEW = 6  # with fewer samples the interval of a median is their whole range, and less than LEVEL
#: Student's t at 97.5 %, by degrees of freedom; more have the last, which is too wide.
_STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
}  # fmt: skip

Interval = tuple[float, float]
Numbers = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Order statistics of the samples; ``outliers`` are beyond 1.5 quartile distances."""

    n: int
    minimum: float
    q1: float
    median: float
    q3: float
    outliers: int = 0

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


def summarise(samples: Numbers) -> Summary:
    """Summarise at least one sample; ValueError without any."""
    if len(samples) == 0:
        raise ValueError("mbkern bench: there are no samples to summarise")
    values = np.asarray(samples, dtype=np.float64)
    q1, median, q3 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    reach = 1.5 * (q3 - q1)
    outliers = int(np.count_nonzero((values < q1 - reach) | (values > q3 + reach)))
    return Summary(len(values), float(values.min()), q1, median, q3, outliers)


def _resampled(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Medians of RESAMPLES samples drawn with replacement."""
    random = np.random.default_rng(seed)
    picked = random.integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(np.median(values[picked], axis=1), dtype=np.float64)


def _thinned(samples: Numbers) -> NDArray[np.float64]:
    """At most MOST of the samples, which costs time only, drawn at random.

    Not every k-th: where two take turns, A B B A, that would pick rounds of one order.
    """
    values = np.asarray(samples, dtype=np.float64)
    if len(values) <= MOST:
        return values
    return np.random.default_rng(0).choice(values, MOST, replace=False)


def _ends(statistics: NDArray[np.float64]) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(statistics, (tail, 1 - tail))
    return float(low), float(high)


def median_interval(samples: Numbers) -> Interval:
    """The 95 % interval of the median between two order statistics, whatever the distribution.

    The true median lies above a sample as often as a coin falls, so that ends as far inside as the
    binomial distribution allows hold it in 95 % or more of all cases. (Percentiles of resampled
    medians do so only of many samples: of seven they hold it in 87 %.) Fewer than FEW samples all
    lie within, which is less than 95 %: 94 % of five, half of two.
    """
    values = np.sort(np.asarray(samples, dtype=np.float64))
    beyond = _beyond(len(values))
    return float(values[beyond]), float(values[-1 - beyond])


def _beyond(n: int) -> int:
    """How many of n samples may lie beyond each end of the interval."""
    if n > 1000:  # 2^-n is 0 there; one less than by the normal distribution: not too narrow
        return int((n - 1.96 * math.sqrt(n)) / 2) - 1
    tail, chance, count = 0.0, 0.5**n, 0
    while tail + chance <= (1 - LEVEL) / 2:
        tail += chance
        chance *= (n - count) / (count + 1)
        count += 1
    return max(count - 1, 0)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, or the median of paired ratios, with its 95 % interval.

    ``enough``: whether there are samples enough for the interval to be one of 95 %.
    """

    median: float
    low: float
    high: float
    n: int
    of_minima: float
    enough: bool = True


def paired(above: Numbers, below: Numbers) -> Ratio | None:
    """The median of ratios round by round; None without a round that both have."""
    n = min(len(above), len(below))
    a = np.asarray(above[:n], dtype=np.float64)
    b = np.asarray(below[:n], dtype=np.float64)
    ratios = a[b > 0] / b[b > 0]
    if not len(ratios):
        return None
    low, high = median_interval(ratios)
    of_minima = float(np.min(above) / np.min(below))
    enough = len(ratios) >= FEW
    return Ratio(float(np.median(ratios)), low, high, len(ratios), of_minima, enough)


def in_turns(above: Numbers, below: Numbers, blocks: Sequence[int]) -> Ratio | None:
    """The ratio of two that took turns, A B B A, in several pairs of processes.

    ``blocks``: rounds of each pair of processes, in order. Two successive rounds have both orders;
    their geometric mean is free of what it costs to be first. A process is faster or slower than
    its twin by some percent for as long as it lives, so its samples are not independent. With two
    pairs or more the interval is that of Student's t for the medians of the pairs, or that of the
    median within them where that is wider. None without a round.
    """
    a, b = (np.asarray(x[: min(len(above), len(below))], dtype=np.float64) for x in (above, below))
    if not len(a):
        return None
    logs: list[NDArray[np.float64]] = []
    start = 0
    for rounds in blocks or [len(a)]:
        block = np.log(a[start : start + rounds] / b[start : start + rounds])
        start += rounds
        even = len(block) // 2 * 2
        if even:
            logs.append(block[:even].reshape(-1, 2).mean(axis=1))
        elif len(block):
            logs.append(block)
    medians = np.array([float(np.median(block)) for block in logs])
    middle = float(medians.mean())
    centred = np.concatenate([block - np.median(block) for block in logs])
    low, high = (middle + end for end in median_interval(centred))
    if len(medians) >= 2:
        t = _STUDENT[min(len(medians) - 1, max(_STUDENT))]
        reach = t * float(medians.std(ddof=1)) / math.sqrt(len(medians))
        low, high = min(low, middle - reach), max(high, middle + reach)
    of_minima = float(a.min() / b.min())
    enough = len(medians) >= 2 or len(centred) >= FEW
    return Ratio(math.exp(middle), math.exp(low), math.exp(high), len(a), of_minima, enough)


def unpaired(above: Numbers, below: Numbers) -> Ratio | None:
    """The ratio of the medians of two independent sets of samples; None if one is empty."""
    a, b = _thinned(above), _thinned(below)
    if not len(a) or not len(b):
        return None
    of_medians = float(np.median(a) / np.median(b))
    of_minima = float(a.min() / b.min())
    if min(len(a), len(b)) < FEW:
        low, high = float(a.min() / b.max()), float(a.max() / b.min())
    else:
        low, high = _ends(_resampled(a, 1) / _resampled(b, 2))
    # All of three lie above all of three others by chance in one case of 20, of four in one of 70.
    return Ratio(of_medians, low, high, min(len(a), len(b)), of_minima, min(len(a), len(b)) >= 4)


@dataclass(frozen=True)
class Growth:
    """Time grows as size ** slope, by least squares of the logarithms, with a 95 % interval."""

    slope: float
    low: float
    high: float


def growth(sizes: Sequence[float], samples: Sequence[Numbers]) -> Growth | None:
    """The slope of log(median time) over log(size); None with fewer than three sizes.

    The interval comes from resampling each size's samples, and from what the points miss the line
    by, at Student's t of as many degrees of freedom as there are sizes beyond two; the wider of
    both is taken.
    """
    if len(sizes) < 3:
        return None
    x = np.log(np.asarray(sizes, dtype=np.float64))
    medians = np.log([float(np.median(s)) for s in samples])
    x = x - x.mean()
    slope = float(x @ medians / (x @ x))
    missed = medians - medians.mean() - slope * x
    error = math.sqrt(float(missed @ missed) / (len(x) - 2) / float(x @ x))
    logs: Any = np.stack([np.log(_resampled(_thinned(s), k)) for k, s in enumerate(samples)])
    low, high = _ends(x @ logs / (x @ x))
    reach = _STUDENT[min(len(x) - 2, max(_STUDENT))] * error
    return Growth(slope, min(low, slope - reach), max(high, slope + reach))


def knee(sizes: Sequence[float], per_item: Sequence[float], slack: float = 0.1) -> float:
    """The smallest size whose time an item is within ``slack`` of the best; sizes ascend."""
    best = min(per_item)
    return next(s for s, t in zip(sizes, per_item, strict=True) if t <= best * (1 + slack))
