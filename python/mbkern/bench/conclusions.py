"""What the suites minibatch and scaling are for: the knee, the price of cutting, the growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mbkern._units import seconds
from mbkern.bench import statistics
from mbkern.bench.rows import Row, latest
from mbkern.bench.tables import Table


@dataclass(frozen=True)
class Series:
    """Rows of one provider that differ in size only, smallest first.

    ``threads`` is empty where they are what the rows differ in.
    """

    name: str
    provider: str
    allocator: str
    threads: str
    device: str
    cache: str
    rows: list[Row]

    @property
    def state(self) -> str:
        """The allocator's, with the device and the caches where these are not the usual."""
        return self.allocator + self.rows[0].unusual

    @property
    def sizes(self) -> list[float]:
        """What the rows differ in."""
        return [row.size for row in self.rows]

    @property
    def per_sample(self) -> list[float]:
        """Seconds a sample, where the size counts samples."""
        return [(row.median_s or 0.0) / row.size for row in self.rows]

    @property
    def knee(self) -> float:
        """The smallest micro-batch within 10 % of the best time a sample."""
        return statistics.knee(self.sizes, self.per_sample)


def series(rows: Sequence[Row], suite: str) -> list[Series]:
    """The series of a suite, each of one run: of several the last."""
    found: dict[tuple[str, str, str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.suite == suite and row.ranked and "series" in row.extra:
            threads = "" if row.axis == "threads" else str(row.threads)
            key = (row.extra["series"], row.provider, row.allocator, threads, row.device, row.cache)
            members = found.setdefault(key, [])
            if members and members[-1].run != row.run:
                members.clear()
            members.append(row)
    return [
        Series(*key, sorted(latest(members).values(), key=lambda r: r.size))
        for key, members in found.items()
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """Where a range of sizes was cut, and why."""
    return list(dict.fromkeys(r.extra["range"] for r in rows if "range" in r.extra))


def tables(rows: Sequence[Row]) -> list[Table]:
    """Those of the suites that were run."""
    found = [_minibatch(series(rows, "minibatch")), _scaling(series(rows, "scaling"))]
    return [table for table in found if table.rows]


def _minibatch(found: Sequence[Series]) -> Table:
    head = ["evaluation", "provider", "allocator", " threads", " at 1 sample", " best, a sample",
            " knee at", " results that cuts change", " loss error, cut"]  # fmt: skip
    cells = []
    for s in found:
        cut = [r.extra for r in s.rows if "bits_different" in r.extra]
        bits = f"{max(c['bits_different'] for c in cut)}" if cut else ""
        error = f"{max(c['loss_error'] for c in cut):.1e}" if cut else ""
        cells.append([
            s.name, s.provider, s.state, s.threads,
            seconds(s.per_sample[0]) if s.sizes[0] == 1 else "-",
            seconds(min(s.per_sample)), f"{s.knee:.0f}", bits, error,
        ])  # fmt: skip
    return Table("Time a sample against the micro-batch", head, cells)


def _scaling(found: Sequence[Series]) -> Table:
    head = ["growth", "provider", "allocator", " threads", " log-log slope", " 95 % interval",
            " expected"]  # fmt: skip
    cells = []
    for s in found:
        growth = statistics.growth(s.sizes, [r.samples_s for r in s.rows])
        expected = "-1" if s.rows[0].axis == "threads" else "1"
        slope = f"{growth.slope:.2f}" if growth else "too few sizes"
        interval = f"{growth.low:.2f} to {growth.high:.2f}" if growth else ""
        cells.append([s.name, s.provider, s.state, s.threads, slope, interval, expected])
    return Table("Growth of time with size", head, cells)
