"""What a measurement is, and what is read off it: medians, quartiles, paired ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

NOISY = 0.10  # a distance of the quartiles above this share of the median is reported


@dataclass
class Entry:
    """One way to compute the thing, and one sample a round.

    Attributes:
        name: what the tables and goals call it.
        samples: raw samples in the group's unit, in the order of the rounds.
        error: largest error against fp64, relative to the largest exact value.
        correct: whether that error is within the tolerance; if not, the entry is not ranked.
        faults: median of the pages that the kernel had to supply during the timed part.
        note: why there are no samples, or what else the reader must know.
    """

    name: str
    samples: list[float] = field(default_factory=list)
    error: float | None = None
    correct: bool = True
    faults: float | None = None
    note: str = ""


@dataclass
class Group:
    """Ways that were measured side by side in one process; samples with one index are one round."""

    suite: str
    case: str
    threads: int
    allocator: str
    unit: str
    baseline: str
    entries: list[Entry]
    columns: int = 0
    dtype: str = "float32"

    def entry(self, name: str) -> Entry | None:
        """The entry of that name, if there is one."""
        return next((e for e in self.entries if e.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """The group with its raw samples and the summary of each entry."""
        data = asdict(self)
        for entry, raw in zip(self.entries, data["entries"], strict=True):
            raw["summary"] = asdict(summarise(entry.samples)) if entry.samples else None
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Group:
        """The inverse of :meth:`as_json`."""
        entries = [
            Entry(**{key: value for key, value in e.items() if key != "summary"})
            for e in data["entries"]
        ]
        return Group(**{**data, "entries": entries})


@dataclass(frozen=True)
class Summary:
    """Order statistics of the samples."""

    n: int
    minimum: float
    q1: float
    median: float
    q3: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


def summarise(samples: Sequence[float]) -> Summary:
    """Summarise at least one sample."""
    if len(samples) == 1:
        q1 = median = q3 = samples[0]
    else:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(len(samples), min(samples), q1, median, q3)


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of the rounds, with an interval for it (95 %, or all there is)."""

    median: float
    low: float
    high: float
    n: int
    of_minima: float


def paired_ratio(group: Group, numerator: str, denominator: str) -> Ratio | None:
    """Ratio of two entries, round by round; None if one is absent, skipped or wrong."""
    above, below = group.entry(numerator), group.entry(denominator)
    if above is None or below is None or not (above.correct and below.correct):
        return None
    pairs = zip(above.samples, below.samples, strict=False)
    ratios = sorted(a / b for a, b in pairs if b > 0)
    if not ratios:
        return None
    low, high = _median_interval(ratios)
    of_minima = min(above.samples) / min(below.samples)
    return Ratio(statistics.median(ratios), low, high, len(ratios), of_minima)


def _median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median between two order statistics of sorted values.

    Free of assumptions on the distribution: the number of values below the true median is
    binomial(n, 1/2). With fewer than six values all of them lie within the interval.
    """
    n = len(values)
    rank, below = 0, 0.0  # below: probability that at most `rank` values lie under the median
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if below > 0.025:
            break
        rank += 1
    rank = max(rank, 1)
    return values[rank - 1], values[n - rank]
