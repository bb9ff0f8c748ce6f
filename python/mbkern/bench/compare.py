"""Two files, case by case: FASTER, SLOWER, SAME or UNDECIDED, by an interval and not by a number.

The ratio of B's time to A's has a 95 % interval: of rounds where A and B took turns (``bench ab``),
with the differences between processes; of medians else.
SLOWER: all of it lies above 1 + threshold. FASTER: all of it lies
below 1 - threshold. SAME: all of it lies between. UNDECIDED: it reaches across one of these ends,
and more samples are needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mbkern.bench import statistics
from mbkern.bench.display import seconds
from mbkern.bench.rows import Row, latest, load
from mbkern.bench.tables import Table

FASTER, SLOWER, SAME, UNDECIDED = "FASTER", "SLOWER", "SAME", "UNDECIDED"
NOT_COMPARED = "not compared"


@dataclass(frozen=True)
class Rule:
    """What makes a comparison fail: a verdict, at a threshold (a share)."""

    verdict: str = SLOWER
    threshold: float = 0.05

    @staticmethod
    def parse(text: str) -> Rule:
        """From "slower:5%" or "faster:3%"; ValueError says what is understood."""
        match = re.fullmatch(r"(slower|faster):(\d+(?:\.\d+)?)%", text)
        if not match:
            raise ValueError(f"{text!r} is not of the form slower:5% or faster:5%")
        return Rule(match[1].upper(), float(match[2]) / 100)


@dataclass(frozen=True)
class Comparison:
    """One case and provider in both files; ``ratio`` is of B's time to A's."""

    a: Row
    b: Row
    ratio: statistics.Ratio | None
    verdict: str
    reason: str = ""


def judge(ratio: statistics.Ratio, threshold: float) -> str:
    """The verdict on a ratio."""
    if ratio.low > 1 + threshold:
        return SLOWER
    if ratio.high < 1 - threshold:
        return FASTER
    if ratio.low >= 1 - threshold and ratio.high <= 1 + threshold:
        return SAME
    return UNDECIDED


def compare(a: Sequence[Row], b: Sequence[Row], threshold: float) -> list[Comparison]:
    """Rows with one key, in the order of A. Limits and what has no samples are left out."""
    old, new = latest(a), latest(b)
    found = []
    for key, before in old.items():
        after = new.get(key)
        if after is None or before.limit:
            continue
        if not before.ranked or not after.ranked:
            states = f"{before.status} in A, {after.status} in B"
            if "measured" in (before.status, after.status):
                found.append(Comparison(before, after, None, NOT_COMPARED, states))
            continue
        paired = bool(before.pair) and before.pair == after.pair
        ratio = (
            statistics.in_turns(after.samples_s, before.samples_s, before.blocks)
            if paired and before.blocks == after.blocks
            else statistics.unpaired(after.samples_s, before.samples_s)
        )
        if ratio is not None:
            found.append(Comparison(before, after, ratio, judge(ratio, threshold)))
    return found


def table(found: Sequence[Comparison], threshold: float) -> Table:
    """Every comparison."""
    head = ["suite", "case", "dtype", "pass", " threads", "allocator", "provider", " A", " B",
            " B / A", " 95 % interval", " n", "verdict"]  # fmt: skip
    rows = []
    for c in found:
        r = c.ratio
        rows.append([
            c.a.suite, c.a.case, c.a.dtype, c.a.direction, str(c.a.threads), c.a.allocator,
            c.a.provider, seconds(c.a.median_s or 0.0), seconds(c.b.median_s or 0.0),
            f"{r.median:.3f}" if r else "-", f"{r.low:.3f}-{r.high:.3f}" if r else "-",
            str(r.n) if r else "-", f"{c.verdict}: {c.reason}" if c.reason else c.verdict,
        ])  # fmt: skip
    return Table(f"B against A, threshold {threshold:.3g}", head, rows)


def differences(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    """In what the machines of two files differ."""
    ours, theirs = ({k: str(v) for k, v in _machine(rows).items()} for rows in (a, b))
    names = ("cpu", "cpus", "governor", "huge pages", "gpu", "driver", "torch", "python")
    return [
        f"{name}: {ours.get(name)} in A, {theirs.get(name)} in B"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _machine(rows: Sequence[Row]) -> dict[str, object]:
    return next((r.environment for r in rows if r.environment), {})


def failing(found: Sequence[Comparison], rule: Rule) -> list[Comparison]:
    """Comparisons that the rule forbids; a row that was right in A and is not in B is one too."""
    return [
        c for c in found if c.verdict == rule.verdict or (c.verdict == NOT_COMPARED and c.a.ranked)
    ]


def read(paths: Sequence[Path]) -> tuple[list[list[Row]], list[str]]:
    """The rows of each file, and warnings about lines that are none."""
    loaded = [load(path) for path in paths]
    return [rows for rows, _ in loaded], [w for _, warnings in loaded for w in warnings]
