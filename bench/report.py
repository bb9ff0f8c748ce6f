"""From measurements to tables, warnings, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from goals import Verdict

from mbkern.bench.machine import BUSY
from mbkern.bench.results import Entry, Group, paired_ratio
from mbkern.bench.statistics import NOISY, summarise
from mbkern.bench.tables import Table, markdown


def suite_table(suite: str, groups: Sequence[Group]) -> Table:
    """Every entry of a suite: medians with quartiles and minimum, ratio to the group's baseline."""
    units = ", ".join(dict.fromkeys(g.unit for g in groups))
    head = ["case", " threads", "allocator", "way", " median", " quartiles", " minimum", " n",
            " against baseline", " max error", " faults", "note"]  # fmt: skip
    rows = []
    for group in groups:
        for k, entry in enumerate(group.entries):
            place = ["", "", ""] if k else [group.case, str(group.threads), group.allocator]
            rows.append([*place, *_cells(group, entry)])
    return Table(f"{suite} [{units}]", head, rows)


def _cells(group: Group, entry: Entry) -> list[str]:
    error = "" if entry.error is None else f"{entry.error:.1e}"
    if not entry.samples:
        return [entry.name, "-", "-", "-", "0", "-", error, "", entry.note]
    s = summarise(entry.samples)
    faults = "" if entry.faults is None else f"{entry.faults:.0f}"
    notes = [entry.note] if entry.note else []
    if s.spread > NOISY:
        notes.append("noisy")
    return [
        entry.name, _number(s.median), f"{_number(s.q1)}-{_number(s.q3)}", _number(s.minimum),
        str(s.n), _standing(group, entry), error, faults, ", ".join(notes),
    ]  # fmt: skip


def _standing(group: Group, entry: Entry) -> str:
    """How many times faster (or smaller) than the baseline."""
    if not entry.correct:
        return "WRONG"
    if entry.failed:
        return "FAILED"
    if entry.name == group.baseline:
        return "baseline"
    ratio = paired_ratio(group, group.baseline, entry.name)
    if ratio is None:
        return "-"
    if ratio.n == 1:
        return f"{ratio.median:.2f}x"
    return f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"


def _number(value: float) -> str:
    """Three or four significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def goal_table(verdicts: Sequence[Verdict]) -> Table:
    """The issue's goals, each with what was measured."""
    head = ["what", " reach", " measured", " minima", "verdict", "case", " threads", "allocator"]
    rows = [
        [v.goal.what, v.goal.reach, v.measured, v.minima, v.text, v.group.case,
         str(v.group.threads), v.group.allocator]
        for v in verdicts
    ]  # fmt: skip
    return Table("Numbers to reach", head, rows)


def machine_table(document: dict[str, Any]) -> Table:
    """The machine and the conditions."""
    facts = {"command": document["command"], **document["machine"]}
    facts["load average before, after"] = ", ".join(map(str, document["load"]))
    for name, load in document["other_load"].items():
        facts[f"CPUs taken by others, {name}"] = "unknown" if load is None else load
    return Table("Machine", ["what", "value"], [[k, str(v)] for k, v in facts.items()])


def warnings(document: dict[str, Any], groups: Sequence[Group]) -> list[str]:
    """Why these numbers should not be trusted, if so."""
    found = []
    busy = {k: v for k, v in document["other_load"].items() if v is not None and v > BUSY}
    if busy:
        worst = ", ".join(f"{name} {load:.2f}" for name, load in busy.items())
        found.append(f"The machine was busy: CPUs taken by others, on average: {worst}.")
    if document["load"][0] > 0.5:
        found.append(f"The load average was {document['load'][0]} before the first measurement.")
    timed = [
        summarise(e.samples) for g in groups for e in g.entries if e.samples and g.unit != "MiB"
    ]
    noisy = sum(s.spread > NOISY for s in timed)
    if noisy:
        found.append(
            f"{noisy} of {len(timed)} rows have quartiles over {NOISY:.0%} of the median apart."
        )
    few = sum(s.n < 6 for s in timed)
    if few:
        found.append(f"{few} rows have fewer than 6 samples: their intervals are the whole range.")
    for group in groups:
        if group.allocator == "recycled":
            pages = max((e.faults or 0 for e in group.entries), default=0)
            if pages > 100:
                found.append(f"{group.case} recycled: still {pages:.0f} page faults in a run.")
    wrong = [f"{e.name} at {g.case}" for g in groups for e in g.entries if not e.correct]
    if wrong:
        found.append(f"Wrong results, not ranked: {'; '.join(wrong)}.")
    raised = [f"{e.name} at {g.case}" for g in groups for e in g.entries if e.failed]
    if raised:
        found.append(f"Failed, not ranked: {'; '.join(raised)}.")
    found += document["failures"]
    return found


def as_markdown(document: dict[str, Any], tables: Sequence[Table], cautions: Sequence[str]) -> str:
    """The whole report."""
    parts = [
        "# Benchmark results",
        "",
        f"Made by `{document['command']}`; see bench/README.md.",
        "",
    ]
    parts += [f"- **{text}**" for text in cautions] + [""] * bool(cautions)
    return "\n".join(parts) + "\n".join(markdown(t) for t in tables)
