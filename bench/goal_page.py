"""docs/speed.md: what was aimed at and what was reached, from bench/results/goals.json.

python bench/run.py --json RUN.json
python bench/goal_page.py --take RUN.json ...   put runs into the results of their machine, suite
                                                by suite
python bench/goal_page.py --write               write the page
python bench/goal_page.py                       status 1 if the page says anything else
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401  before mbkern, which uses its OpenMP runtime
from goals import GOALS
from reasons import REASONS

from mbkern.bench.machine import BUSY

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "goals.json"
PAGE = ROOT / "docs" / "speed.md"
KEPT = ("what", "reach", "measured", "verdict", "case", "threads", "allocator")
HEAD = """\
# What was aimed at, and what was reached

Every number that the project set itself, measured by `python bench/run.py`
([bench/README.md](../bench/README.md) says how), beside what it is compared with, in one process
and in turns. A cell has the range over all cases of that machine and number of threads: shapes,
dtypes, both states of the allocator where none is named; bold is what is missed, and the cases that
miss it are listed below, with the reason where it is known. Cases whose peer computes wrong numbers
are named, not ranked. Written by `python bench/goal_page.py --write` from
`bench/results/goals.json`.
"""


def take(runs: Sequence[Path]) -> None:
    """Put the suites of some runs into those of their machine, in the place of what was there."""
    if not runs:
        return
    machines = _machines() if RESULTS.exists() else {}
    for path in runs:
        run = json.loads(path.read_text())
        if "--quick" in run.get("command", ""):
            raise ValueError(f"{path} is of --quick, which says whether all works, not how fast")
        machine = run["machine"]
        suites = machines.setdefault(
            f"{machine['cpus']} CPUs of an {machine['cpu']} ({machine['isa'].split()[0]})", {}
        )
        facts = {name: machine[name] for name in ("date", "torch", "mbkern", "commit", "threads")}
        others = max((v for v in run["other_load"].values() if v is not None), default=None)
        for suite in dict.fromkeys(goal["suite"] for goal in run["goals"]):
            goals = [
                {k: goal[k] for k in KEPT if k in goal}
                for goal in run["goals"]
                if goal["suite"] == suite
            ]
            suites[suite] = {**facts, "cpus taken by others": others, "goals": goals}
    RESULTS.write_text(json.dumps({"machines": machines}, indent=1) + "\n")


def _machines() -> dict[str, dict[str, Any]]:
    """By machine and suite, what was measured."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())["machines"]
    return found


def _value(text: str) -> float | None:
    found = re.match(r"[-+]?\d+\.?\d*", text)
    return float(found[0]) if found else None


def _misses(goal: dict[str, Any]) -> bool:
    """Whether something was measured, and is not what was aimed at."""
    value = _value(goal["measured"])
    if value is None:
        return False
    if "verdict" in goal:  # by what was measured, of which the text has two digits
        return str(goal["verdict"]).startswith("FAIL")
    sense, bound = goal["reach"].split()[:2]
    limit = float(re.sub(r"[^\d.]", "", bound))
    return value < limit if sense == ">=" else value > limit


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.95 else f"{value:.0f}"


def _cell(goals: Sequence[dict[str, Any]]) -> str:
    """The range of what was measured; bold where a bound is missed."""
    if not goals:
        return "-"
    known = [v for goal in goals if (v := _value(goal["measured"])) is not None]
    if not known:
        return "not measured"
    low, high = _number(min(known)), _number(max(known))
    text = low if low == high else f"{low} to {high}"
    return f"**{text}**" if any(map(_misses, goals)) else text


def _exceptions(rows: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """A line for each aim of several cases that some of them miss, or that could not be ranked."""
    lines = []
    for (what, reach), goals in rows.items():
        cases: dict[str, list[str]] = {}
        for goal in goals:
            if _value(goal["measured"]) is None:
                cases.setdefault(goal["case"], []).append(goal["measured"])
            elif _misses(goal) and len({g["case"] for g in goals}) > 1:
                value = _number(_value(goal["measured"]) or 0.0)
                cases.setdefault(goal["case"], []).append(f"{value} ({_column(goal)})")
        found = (f"{case} {', '.join(dict.fromkeys(said))}" for case, said in cases.items())
        if cases:
            lines.append(f"- {what}, {reach}: {'; '.join(found)}")
    return lines


def text() -> str:
    """The page."""
    machines = dict(zip(string.ascii_uppercase, _machines().items(), strict=False))
    lines = [HEAD, *(f"- {letter}: {name}" for letter, (name, _) in machines.items()), ""]
    for suite in dict.fromkeys(goal.suite for goal in GOALS):
        goals: list[dict[str, Any]] = []
        conditions = []
        for letter, (_, suites) in machines.items():
            if suite in suites:
                goals += [goal | {"machine": letter} for goal in suites[suite]["goals"]]
                conditions.append(f"{letter}: {_conditions(suites[suite])}")
        if goals:
            lines += [f"## {suite}", "", "  \n".join(conditions), "", *_table(goals), ""]
            why = REASONS.get(suite, ()) if any(map(_misses, goals)) else ()
            notes = [*_exceptions(_rows(goals)), *(f"- Why: {reason}" for reason in why)]
            lines += [*notes, ""] if notes else []
    return "\n".join(lines)


def _conditions(suite: dict[str, Any]) -> str:
    others = suite["cpus taken by others"]
    load = "unknown" if others is None else f"at most {others:.2f}"
    busy = " **The machine was busy.**" if others is not None and others > BUSY else ""
    return (
        f"{suite['date'][:10]}, torch {suite['torch']}, commit {suite['commit'][:7]}; "
        f"CPUs taken by others: {load}.{busy}"
    )


def _rows(goals: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By what was aimed at."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for goal in goals:
        rows.setdefault((_what(goal), goal["reach"]), []).append(goal)
    return rows


def _table(goals: Sequence[dict[str, Any]]) -> list[str]:
    columns = sorted({_column(goal) for goal in goals})
    lines = [f"| what | aim | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]
    for (what, reach), row in _rows(goals).items():
        cells = (_cell([g for g in row if _column(g) == column]) for column in columns)
        lines.append(f"| {what} | {reach} | {' | '.join(cells)} |")
    return lines


def _column(goal: dict[str, Any]) -> str:
    return f"{goal['machine']}, {goal['threads']} thread{'s' * (goal['threads'] != 1)}"


def _what(goal: dict[str, Any]) -> str:
    """A goal, with the state of the allocator where its bound depends on that."""
    what, state = goal["what"], goal["allocator"]
    return what if state in what or not state else f"{what}, {state}"


def main(argv: Sequence[str]) -> int:
    """Check, take runs, or write."""
    parser = argparse.ArgumentParser(
        prog="bench/goal_page.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--take", nargs="+", type=Path, metavar="RUN.json", default=[])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    try:
        take(args.take)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    made = text()
    if args.write or args.take:
        PAGE.write_text(made)
        return 0
    if not PAGE.exists() or PAGE.read_text() != made:
        print(f"{PAGE.name} does not say what {RESULTS.name} says: bench/goal_page.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
