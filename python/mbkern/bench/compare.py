"""Two files, case by case: FASTER, SLOWER, SAME or UNDECIDED, by an interval and not by a number.

The ratio of B's time to A's has a 95 % interval: of rounds where A and B took turns (``bench ab``),
with the differences between processes; of medians else, without them. SLOWER: all of it lies above
1 + threshold. FASTER: all of it lies below 1 - threshold. SAME: all of it lies between. UNDECIDED:
it reaches across one of these ends, or there are too few samples for an interval; more are needed.
What only one of them has a time for is named as not compared; what B has lost fails every rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbkern._units import seconds
from mbkern.bench import statistics
from mbkern.bench.rows import ALL, MEASURED, Key, Row, latest, load
from mbkern.bench.tables import Table

FASTER, SLOWER, SAME, UNDECIDED = "FASTER", "SLOWER", "SAME", "UNDECIDED"
NOT_COMPARED = "not compared"
TOO_FEW = "too few samples"
MACHINE = ("cpu", "cpus", "isa", "governor", "huge pages", "gpu", "driver", "torch", "python")


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
    """One case and provider; ``ratio`` is of B's time to A's. A side that has no row is None."""

    a: Row | None
    b: Row | None
    ratio: statistics.Ratio | None
    verdict: str
    reason: str = ""

    @property
    def row(self) -> Row:
        """One that says which case and provider this is."""
        row = self.a or self.b
        assert row is not None
        return row

    @property
    def lost(self) -> bool:
        """Whether A has a time and B has none."""
        return self.ratio is None and self.a is not None and self.a.ranked


def judge(ratio: statistics.Ratio, threshold: float) -> str:
    """The verdict on a ratio."""
    if not ratio.enough:
        return UNDECIDED
    if ratio.low > 1 + threshold:
        return SLOWER
    if ratio.high < 1 - threshold:
        return FASTER
    if ratio.low >= 1 - threshold and ratio.high <= 1 + threshold:
        return SAME
    return UNDECIDED


def compare(a: Sequence[Row], b: Sequence[Row], threshold: float) -> list[Comparison]:
    """What at least one of them has a time for, in the order of A, then that of B. No limits."""
    old, new = latest(a), latest(b)
    found = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if any(row and row.limit for row in (before, after)):
            continue
        if before and after and before.ranked and after.ranked:
            found.append(_timed(before, after, threshold))
        elif (before and before.ranked) or (after and after.ranked):
            reason = _unmatched(before, after, old, new)
            found.append(Comparison(before, after, None, NOT_COMPARED, reason))
    return found


def _timed(before: Row, after: Row, threshold: float) -> Comparison:
    ratio = (
        _in_turns(before, after)
        if took_turns(before, after)
        else statistics.unpaired(after.samples_s, before.samples_s)
    )
    if ratio is None:
        return Comparison(before, after, None, NOT_COMPARED)
    reason = "" if ratio.enough else TOO_FEW
    return Comparison(before, after, ratio, judge(ratio, threshold), reason)


def took_turns(before: Row, after: Row) -> bool:
    """Whether both were measured by one ``bench ab``, in as many pairs of processes."""
    same = len(before.blocks) == len(after.blocks)
    return bool(before.pair) and before.pair == after.pair and same


def _in_turns(before: Row, after: Row) -> statistics.Ratio | None:
    """Round by round; of a pair of processes those that both have, as Ctrl-C may cut one."""
    rounds = [min(both) for both in zip(before.blocks, after.blocks, strict=True)]
    old, new = (_first(row, rounds) for row in (before, after))
    return statistics.in_turns(new, old, rounds)


def _first(row: Row, rounds: Sequence[int]) -> list[float]:
    """The first samples of each of a row's blocks, as many as ``rounds`` says."""
    found: list[float] = [] if rounds else row.samples_s
    start = 0
    for whole, kept in zip(row.blocks, rounds, strict=True):
        found += row.samples_s[start : start + kept]
        start += whole
    return found


def _unmatched(
    before: Row | None, after: Row | None, old: Mapping[Key, Row], new: Mapping[Key, Row]
) -> str:
    """Which side has no time, and why, if that is on record."""
    row = before or after
    assert row is not None
    states = []
    for side, mine, rows in (("A", before, old), ("B", after, new)):
        found = mine or _of_all(row, rows)
        if found is None:
            return f"only in {'B' if side == 'A' else 'A'}"
        states.append(f"{_state(found)} in {side}" + (f" ({found.reason})" if found.reason else ""))
    return ", ".join(states)


def _state(row: Row) -> str:
    return "without samples" if row.status == MEASURED and not row.samples_s else row.status


def _of_all(row: Row, rows: Mapping[Key, Row]) -> Row | None:
    """What was recorded for all providers of the row's case, or for its whole suite."""
    for other in rows.values():
        if other.provider != ALL or (other.device, other.allocator) != (row.device, row.allocator):
            continue
        place = (other.case, other.dtype, other.threads)
        if other.case == ALL and row.suite in other.suite.split(", "):
            return other
        same = other.suite == row.suite and place == (row.case, row.dtype, row.threads)
        if same and other.direction in (row.direction, "both"):
            return other
    return None


def table(found: Sequence[Comparison], threshold: float) -> Table:
    """Every comparison."""
    head = ["suite", "case", "dtype", "pass", " threads", "allocator", "provider", " A", " B",
            " B / A", " 95 % interval", " n", "verdict"]  # fmt: skip
    rows = []
    for c in found:
        r, row = c.ratio, c.row
        rows.append([
            row.suite, row.case, row.dtype, row.direction, str(row.threads),
            row.allocator + row.unusual, row.provider,
            *(seconds(s.median_s) if s and s.median_s else "-" for s in (c.a, c.b)),
            f"{r.median:.3f}" if r else "-", f"{r.low:.3f}-{r.high:.3f}" if r else "-",
            str(r.n) if r else "-", f"{c.verdict}: {c.reason}" if c.reason else c.verdict,
        ])  # fmt: skip
    return Table(f"B against A, threshold {threshold:.3g}", head, rows)


def differences(
    a: Sequence[Row], b: Sequence[Row], names: Sequence[str] = MACHINE, sides: Sequence[str] = "AB"
) -> list[str]:
    """In what the machines of two files differ: of the last rows, which are those compared."""
    ours, theirs = ([r.environment for r in latest(rows).values() if r.environment]
                    for rows in (a, b))  # fmt: skip
    return [
        f"{name}: {_values(ours, name)} in {sides[0]}, {_values(theirs, name)} in {sides[1]}"
        for name in names
        if _values(ours, name) != _values(theirs, name)
    ]


def _values(environments: Sequence[Mapping[str, object]], name: str) -> str:
    found = {str(environment.get(name)) for environment in environments}
    return " and ".join(sorted(found)) or "unknown"


def doubts(found: Sequence[Comparison]) -> list[str]:
    """What the intervals leave out, of rows that did not take turns in several processes."""
    ratios = [(c.a, c.b) for c in found if c.ratio and c.a and c.b]
    apart = sum(not took_turns(a, b) for a, b in ratios)
    single = sum(took_turns(a, b) and len(a.blocks) == 1 for a, b in ratios)
    notes = []
    if apart:
        notes.append(
            f"{apart} of {len(ratios)} did not take turns: their intervals hold neither what "
            "changes from day to day nor what differs from process to process; bench ab measures "
            "that"
        )
    if single:
        notes.append(
            f"{single} of {len(ratios)} took turns in one pair of processes: their intervals do "
            "not hold what differs from process to process"
        )
    return notes


def failing(found: Sequence[Comparison], rule: Rule) -> list[Comparison]:
    """Comparisons that the rule forbids; what was right in A, and has no time in B, is one too."""
    return [c for c in found if c.verdict == rule.verdict or c.lost]


def read(paths: Sequence[Path]) -> tuple[list[list[Row]], list[str]]:
    """The rows of each file, and warnings about lines that are none."""
    loaded = [load(path) for path in paths]
    return [rows for rows, _ in loaded], [w for _, warnings in loaded for w in warnings]
