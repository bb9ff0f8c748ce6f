"""docs/speed.md: what was aimed at and what was reached, from bench/results/goals.json.

python bench/run.py --json RUN.json
python bench/goal_page.py --take RUN.json ...   put runs into the results, suite by suite
python bench/goal_page.py --write               write the page
python bench/goal_page.py                       status 1 if the page says anything else
"""

from __future__ import annotations

import argparse
import json
import re
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
and in turns. A cell has the range over all cases of that number of threads: shapes, dtypes, both
states of the allocator where none is named; bold is what is missed, and the cases that miss it are
listed below, with the reason where it is known. Cases whose peer computes wrong numbers are named,
not ranked. Written by `python bench/goal_page.py --write` from `bench/results/goals.json`.
"""


def take(runs: Sequence[Path]) -> None:
    """Put the suites of some runs into the results, in the place of what was there of them."""
    if not runs:
        return
    results: dict[str, Any] = {"suites": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    for path in runs:
        run = json.loads(path.read_text())
        if "--quick" in run.get("command", ""):
            raise ValueError(f"{path} is of --quick, which says whether all works, not how fast")
        machine = run["machine"]
        facts = {
            name: machine[name]
            for name in ("date", "cpu", "cpus", "isa", "torch", "mbkern", "commit", "threads")
        }
        others = max((v for v in run["other_load"].values() if v is not None), default=None)
        for suite in dict.fromkeys(goal["suite"] for goal in run["goals"]):
            goals = [
                {k: goal[k] for k in KEPT if k in goal}
                for goal in run["goals"]
                if goal["suite"] == suite
            ]
            results["suites"][suite] = {**facts, "cpus taken by others": others, "goals": goals}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


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
                threads = _threads(goal["threads"])
                value = _number(_value(goal["measured"]) or 0.0)
                cases.setdefault(goal["case"], []).append(f"{value} ({threads})")
        found = (f"{case} {', '.join(dict.fromkeys(said))}" for case, said in cases.items())
        if cases:
            lines.append(f"- {what}, {reach}: {'; '.join(found)}")
    return lines


def text() -> str:
    """The page."""
    suites = json.loads(RESULTS.read_text())["suites"]
    lines = [HEAD]
    order = list(dict.fromkeys(goal.suite for goal in GOALS))
    for suite, data in sorted(suites.items(), key=lambda item: order.index(item[0])):
        others = data["cpus taken by others"]
        load = "unknown" if others is None else f"at most {others:.2f}"
        busy = " **The machine was busy.**" if others is not None and others > BUSY else ""
        lines += [
            f"## {suite}",
            "",
            f"{data['date'][:10]}, {data['cpus']} CPUs of an {data['cpu']} "
            f"({data['isa'].split()[0]}), torch {data['torch']}, commit {data['commit'][:7]}. "
            f"CPUs taken by others: {load}.{busy}",
            "",
        ]
        threads = sorted({goal["threads"] for goal in data["goals"]})
        lines.append(f"| what | aim |{''.join(f' {_threads(t)} |' for t in threads)}")
        lines.append("| --- | --- |" + " --- |" * len(threads))
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for goal in data["goals"]:
            rows.setdefault((_what(goal), goal["reach"]), []).append(goal)
        for (what, reach), goals in rows.items():
            cells = (_cell([g for g in goals if g["threads"] == t]) for t in threads)
            lines.append(f"| {what} | {reach} | {' | '.join(cells)} |")
        exceptions = _exceptions(rows)
        if any(map(_misses, data["goals"])):
            exceptions += [f"- Why: {reason}" for reason in REASONS.get(suite, ())]
        lines += ["", *exceptions, ""] if exceptions else [""]
    return "\n".join(lines)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


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
