"""What a run shows: tables of rows, progress with the time that remains, and warnings."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from mbkern._units import seconds
from mbkern.bench import gpu, statistics
from mbkern.bench.machine import BUSY
from mbkern.bench.rows import ALL, FAILED, SKIPPED, WRONG, Row, grouped
from mbkern.bench.tables import Table, is_plain

HEAD = ("case", "dtype", "pass", " threads", "allocator", "provider", " median", " 95 % interval",
        " IQR", " n", " out", " vs. baseline", " bandwidth", " TFLOP/s", " error", " peak MiB",
        "note")  # fmt: skip


#: What stands in these columns, for those who have not read bench/README.md.
LEGEND = (
    "median, 95 % interval: of n samples of a call; IQR: distance of their quartiles over the "
    "median; out: outliers among them",
    "vs. baseline: how many times faster, by samples taken in turn, with the interval",
    "bandwidth: bytes a second that must move, as a share of those of a bare pass over the memory",
    "error: the largest against fp64, over the largest exact value; peak MiB: above the inputs",
    "allocator: default gives large results fresh pages at each call, recycled used ones; cold "
    "caches are swept before each run",
    "provider: autograd ends in loss.backward(); in place writes the gradient over the logits; "
    "limits are the machine's",
)


def suite_table(suite: str, rows: Sequence[Row]) -> Table:
    """Every row of a suite, group by group, but for providers that were skipped."""
    cells: list[list[str]] = []
    for group in grouped([row for row in rows if row.status != SKIPPED]).values():
        base = next((r for r in group if r.provider == r.baseline and r.ranked), None)
        for k, row in enumerate(group):
            place = [row.case, row.dtype, row.direction, str(row.threads),
                     row.allocator + row.unusual]  # fmt: skip
            cells.append([*(place if k == 0 else [""] * 5), *_cells(row, base)])
    return Table(suite, HEAD, cells)


def skipped(rows: Sequence[Row]) -> list[str]:
    """Each provider that was skipped, once, with the reason."""
    reasons = {(r.provider if r.provider != ALL else f"suite {r.suite}", r.reason)
               for r in rows if r.status == SKIPPED}  # fmt: skip
    return [f"{name}: {reason}" for name, reason in sorted(reasons)]


def speedup(row: Row, base: Row | None) -> statistics.Ratio | None:
    """How many times faster than the baseline, round by round; None where that says nothing."""
    if base is None or not row.ranked or not base.ranked or row is base or row.run != base.run:
        return None
    return statistics.paired(base.samples_s, row.samples_s)


def _cells(row: Row, base: Row | None) -> list[str]:
    error = "" if row.error_vs_fp64 is None else f"{row.error_vs_fp64:.1e}"
    if row.median_s is None or row.status in (SKIPPED, FAILED):
        return [row.provider, *["-"] * 8, error, "", f"{row.status}: {row.reason}"]
    low, high = row.interval_s or [row.median_s] * 2
    ratio = speedup(row, base)
    standing = "baseline" if row is base else ""
    if row.status == WRONG:
        standing = "WRONG"
    elif ratio is not None:
        standing = f"{ratio.median:.2f}x"
        standing += f" ({ratio.low:.2f}-{ratio.high:.2f})" * (ratio.n > 1)
    spread = ((row.q3_s or 0) - (row.q1_s or 0)) / row.median_s if row.median_s else 0.0
    notes = [row.reason] if row.reason else []
    notes += ["noisy"] if spread > statistics.NOISY else []
    notes += [f"{row.faults:.0f} page faults"] if (row.faults or 0) >= 100 else []
    notes += [f"host {seconds(row.host_s)}"] if row.host_s else []
    share, peak = row.bandwidth_share, row.peak_bytes
    return [
        row.provider, seconds(row.median_s), f"{seconds(low)}-{seconds(high)}", f"{spread:.1%}",
        str(len(row.samples_s)), str(row.outliers), standing,
        "" if share is None else f"{share:.0%}",
        f"{row.flops / row.median_s / 1e12:.3f}" if row.flops else "", error,
        "" if peak is None else f"{peak / 2**20:.1f}", ", ".join(notes),
    ]  # fmt: skip


def machine_table(row: Row, title: str = "Machine", **first: str) -> Table:
    """The machine of a row, after other facts."""
    facts = {**first, **row.environment}
    return Table(title, ["what", "value"], [[k, _fact(v)] for k, v in facts.items()])


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)


def warnings(rows: Sequence[Row]) -> list[str]:
    """Why these numbers should not be trusted, if so."""
    found = []
    timed = [r for r in rows if r.samples_s]
    loads = [r.environment.get("cpus taken by others") for r in timed]
    busy = [load for load in loads if load is not None and load > BUSY]
    if busy:
        found.append(
            f"The machine was busy: others took up to {max(busy):.2f} CPUs during {len(busy)} of "
            f"{len(timed)} rows."
        )
    slow = {
        reason
        for r in timed
        for when in ("before", "after")
        for reason in gpu.throttling(r.environment.get(when, {}))
    }
    if slow:
        found.append(f"The GPU was throttled: {', '.join(sorted(slow))}.")
    spread = [r for r in timed if r.median_s and r.q1_s is not None and r.q3_s is not None
              and r.q3_s - r.q1_s > statistics.NOISY * r.median_s]  # fmt: skip
    if spread:
        found.append(
            f"{len(spread)} of {len(timed)} rows have quartiles more than "
            f"{statistics.NOISY:.0%} of the median apart."
        )
    few = sum(len(r.samples_s) < statistics.FEW for r in timed)
    if few:
        found.append(
            f"{few} of {len(timed)} rows have fewer than {statistics.FEW} samples: their intervals "
            "are the whole range, and hold the median less often than 95 %."
        )
    kept = {r.case for r in timed if r.allocator == "recycled" and (r.faults or 0) > 100}
    if kept:
        found.append(f"Recycled memory was not recycled in {', '.join(sorted(kept))}.")
    for status in (WRONG, FAILED):
        bad = dict.fromkeys(f"{r.provider} at {r.case}" for r in rows if r.status == status)
        if bad:
            found.append(f"{status.capitalize()}, not ranked: {'; '.join(bad)}.")
    return found


class Progress:
    """A bar with the time that remains, or a line for each case where there is no terminal."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()
        self._bar: Any = None
        if not is_plain(sys.stderr):
            from rich.console import Console
            from rich.progress import Progress as Bar
            from rich.progress import TimeRemainingColumn

            self._bar = Bar(*Bar.get_default_columns()[:-1], TimeRemainingColumn(),
                            console=Console(stderr=True), transient=True)  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=total)

    def case(self, label: str) -> None:
        """Say what is being measured; the last one is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=label[:60])
        else:
            left = ""
            if self._done:
                spent = time.monotonic() - self._start
                left = f", {spent / self._done * (self._total - self._done):.0f} s left"
            print(f"[{self._done + 1}/{self._total}{left}] {label}", file=sys.stderr, flush=True)
        self._done += 1

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
