"""Losses on a GPU at the speed of memory: against its own copies, torch, and peers, in one run.

Each way is first checked against fp64. Timed are loss and gradient, by events; not timed are
restoring the logits and compiling. A peer that is not installed, or fails, is listed with its
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from goals import Verdict, judge
from report import goal_table, suite_table

from gpu import family, graphs, heads, ways
from gpu.goals import GOALS, SUITE
from gpu.problem import Case, Problem
from gpu.stage import FAILED, PASSED, Clock, Report
from mbkern.bench import tables
from mbkern.bench.gpu import sensors
from mbkern.bench.results import Entry, Group
from mbkern.bench.statistics import summarise
from mbkern.bench.timing import Effort, Way, interleave

ELEMENTS = 1 << 28
COLUMNS = (1000, 4096, 32_000, 50_257, 128_256, 262_144)
COMPILED_AT = (1000, 32_000, 128_256)  # compiling takes long
DTYPES = (torch.float32, torch.bfloat16)
EFFORT = Effort(0.5, 0.05, least=10, most=100)
FAMILY_EFFORT = Effort(0.15, 0.0, least=7, most=30)
HEAD_EFFORT = Effort(4.0, 0.5, least=5, most=20)
HEAD = (8192, 128_256, 4096)  # rows, classes, width
RESERVE = 30.0  # seconds that the end of the stage needs

Makers = Mapping[str, Callable[[Any], ways.Run]]
Plan = Sequence[tuple[Case, Makers, int]]  # a case, its ways, the bytes an element must move
ACCUMULATED = ", accumulated"  # after the case


def plan(elements: int) -> Plan:
    """All cases of the numbers to reach."""
    cases: list[tuple[Case, Makers, int]] = []
    for dtype in DTYPES:
        size = dtype.itemsize
        for columns in COLUMNS:
            case = Case("cross_entropy", -(-elements // columns), columns, dtype)
            makers = dict(ways.CLASSES)
            if columns not in COMPILED_AT:
                del makers[ways.COMPILED]
            cases.append((case, makers, 2 * size))
            if columns == 32_000:
                cases.append((case, ways.BUFFER, size + 8))
        case = Case("half_squared_error", elements >> 12, 1 << 12, dtype)
        cases.append((case, ways.ELEMENTS, 3 * size))
        cases.append((case, ways.BUFFER, 2 * size + 8))
    return cases


def _copy(problem: Problem, size: int) -> Way:
    """A copy that reads and writes ``size`` bytes in all."""
    a = torch.ones(size // 8, dtype=torch.float32, device=problem.plain.device)
    b = torch.empty_like(a)
    return Way(ways.COPY, lambda: b.copy_(a), problem.restore)


def attempt(problem: Problem, makers: Makers) -> tuple[list[Way], list[Entry]]:
    """The ways that work, and for every way its error or why it is not timed."""
    timed: list[Way] = []
    entries: list[Entry] = []
    for name, make in makers.items():
        problem.restore()
        try:
            run = make(problem)
            error = problem.error(*run())
        except Exception as failure:  # of a peer: the others go on
            if name.startswith("mbkern"):
                raise
            reason = str(failure) or type(failure).__name__
            entries.append(Entry(name, note=reason.splitlines()[0][:100]))
        else:
            timed.append(Way(name, run, problem.restore))
            entries.append(Entry(name, error=error, correct=error <= problem.tolerance))
    return timed, entries


def _fill(entries: Sequence[Entry], timed: Sequence[Entry]) -> None:
    for measured in timed:
        for entry in entries:
            if entry.name == measured.name:
                entry.take(measured)


def measure(case: Case, makers: Makers, size: int, effort: Effort, device: str) -> Group:
    """All ways of a case, each checked first, and a copy of ``size`` bytes an element."""
    problem = Problem(case, device)
    timed, entries = attempt(problem, makers)
    copy = _copy(problem, size * problem.plain.numel())
    entries = [Entry(ways.COPY), *entries]
    _fill(entries, interleave([copy, *timed], effort, device))
    label = str(case) + ACCUMULATED * (makers is ways.BUFFER)
    return Group(SUITE, label, 1, device, "ms", ways.COPY, entries, case.columns, case.dtype_name)


def compact(group: Group) -> dict[str, Any]:
    """A group for the results file: without samples, and without what goes without saying."""
    entries = []
    for e in group.entries:
        kept: dict[str, Any] = {"name": e.name}
        if e.samples:
            s = summarise(e.samples)
            kept |= {"median": _short(s.median), "q1": _short(s.q1), "q3": _short(s.q3), "n": s.n}
        if e.error is not None:
            kept["error"] = _short(e.error, 2)
        kept |= {"correct": False} if not e.correct else {}
        kept |= {"note": e.note} if e.note else {}
        entries.append(kept)
    return {"suite": group.suite, "case": group.case, "unit": group.unit,
            "baseline": group.baseline, "entries": entries}  # fmt: skip


def _short(number: float, digits: int = 4) -> float:
    return float(f"{number:.{digits}g}")


def _verdicts(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    return [
        {"what": v.goal.what, "reach": v.goal.reach, "measured": v.measured, "verdict": v.text,
         "case": v.group.case}
        for v in verdicts
    ]  # fmt: skip


def _bandwidth(group: Group, bytes_moved: int) -> float:
    """Of the group's copy, in GB/s, bytes read and bytes written."""
    copy = group.entry(ways.COPY)
    assert copy is not None
    return bytes_moved / summarise(copy.samples).median / 1e6


def check(device: str, clock: Clock, elements: int = ELEMENTS, effort: Effort = EFFORT) -> Report:
    """Measure everything; wrong results fail the stage, missed goals are listed."""
    groups: list[Group] = []
    left_out: list[str] = []
    copied = 0.0
    on_gpu = device != "cpu"

    def keep(found: Sequence[Group]) -> None:
        for group in found:
            print(tables.plain(suite_table(group.suite, [group])), flush=True)
        groups.extend(found)
        if on_gpu:
            torch.cuda.empty_cache()

    for case, makers, size in plan(elements):
        if clock.left() < RESERVE:
            left_out.append(str(case))
            continue
        group = measure(case, makers, size, effort, device)
        copied = max(copied, _bandwidth(group, size * case.rows * case.columns))
        keep([group])
    hot = sensors() if on_gpu else {}
    if on_gpu:
        keep([graphs.measure(effort)])
    if clock.left() >= RESERVE:
        size, long = (HEAD, HEAD_EFFORT) if on_gpu else ((64, 500, 32), effort)
        keep(heads.measure(*size, long, device))
    else:
        left_out.append("heads")
    short = FAMILY_EFFORT if on_gpu else effort
    for formula, shape, dtype in family.plan(elements):
        if clock.left() < RESERVE:
            left_out.append(f"{formula.name} {dtype}")
            continue
        keep([family.measure(formula, shape, dtype, short, device)])
    verdicts = judge(groups, GOALS) if on_gpu else []
    tables.show(goal_table(verdicts))
    print(f"copy: {copied:.0f} GB/s")
    wrong = [f"{e.name} at {g.case}" for g in groups for e in g.entries
             if not e.correct and e.name.startswith("mbkern")]  # fmt: skip
    reasons = [f"wrong: {', '.join(wrong)}"] if wrong else []
    reasons += [f"out of time for {', '.join(left_out)}"] if left_out else []
    missed = sum(v.passed is False for v in verdicts)
    reasons += [f"{missed} of {len(verdicts)} goals missed"] if missed else []
    details = {
        "copy GB/s": round(copied, 1),
        "sensors while busy": hot,
        "effort": asdict(effort),
        "goals": _verdicts(verdicts),
        "groups": [compact(g) for g in groups],
    }
    return Report(FAILED if wrong else PASSED, "; ".join(reasons), details)


def rehearse(clock: Clock) -> Report:
    """Small cases on the CPU: every way that is here must be right."""
    return check("cpu", clock, 1 << 18, Effort(0.05, 0.0, least=3))
