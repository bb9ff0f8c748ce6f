"""The benchmarks of mbkern: ``python bench/run.py`` measures every number of the first issue.

Each suite runs in processes of its own, one for each state of the allocator. See bench/README.md
for what is timed and how to read the tables.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401  before mbkern, which uses its OpenMP runtime
from goals import judge
from report import as_markdown, goal_table, machine_table, suite_table, warnings
from suite_settings import COMPILE, LONG_ROWS, Settings

from mbkern._cli import INTERRUPTED
from mbkern.bench import machine, tables
from mbkern.bench.allocator import environment
from mbkern.bench.arguments import check_output, count, counts
from mbkern.bench.results import Group

SUITES = (
    "cross-entropy",
    "family",
    "head",
    "tiers",
    "host",
    "integration",
    "memory",
    "exact-sum",
    "accumulate",
    "twin",
)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    add = parser.add_argument
    add("--suite", action="append", choices=SUITES, help="which suite; repeatable (default: all)")
    add("--quick", action="store_true", help="fewer cases and rounds: does it work? not: how fast?")
    add("--repeats", type=count, help="rounds of each measurement, instead of a time")
    add("--threads", type=counts, default=(1, 2), help="thread counts, as in 1,2 (default)")
    add(
        "--compile",
        choices=COMPILE,
        default=LONG_ROWS,
        help="which cases torch.compile is tried on",
    )
    add("--json", type=Path, metavar="PATH", help="write all raw samples")
    add("--markdown", type=Path, metavar="PATH", help="write the tables")
    args = parser.parse_args(argv)
    for path in (args.json, args.markdown):
        check_output(path, parser)
    return args


def _run_child(suite: str, settings: Settings) -> dict[str, Any]:
    """Measure a suite in one allocator state; raises RuntimeError with the reason."""
    print(f"{suite}, {settings.allocator} allocator", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        child = Path(__file__).with_name("child.py")
        done = subprocess.run(
            [sys.executable, str(child), suite, settings.to_json(), str(result)],
            env=environment(settings.allocator), check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the process ended with status {done.returncode}; see above")
        data: dict[str, Any] = json.loads(result.read_text())
        return data


def _measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Group]]:
    started, before = time.monotonic(), machine.load_average()
    other_load: dict[str, float | None] = {}
    failures: list[str] = []
    groups: list[Group] = []
    interrupted = False
    parts = [
        (suite, state)
        for suite in args.suite or SUITES
        for state in importlib.import_module(f"suites.{suite.replace('-', '_')}").STATES
    ]
    for number, (suite, state) in enumerate(parts):
        settings = Settings(state, args.threads, args.quick, args.repeats, args.compile)
        try:
            data = _run_child(suite, settings)
        except RuntimeError as failure:
            failures.append(f"{suite}, {state} allocator: {failure}")
            continue
        except KeyboardInterrupt:  # what was measured before is kept
            interrupted = True
            left = ", ".join(f"{suite} ({state})" for suite, state in parts[number:])
            failures.append(f"Interrupted: not measured: {left}.")
            break
        other_load[f"{suite} ({state})"] = data["other_load"]
        groups += [Group.from_json(g) for g in data["groups"]]
    document = {
        "command": shlex.join(["python", "bench/run.py", *sys.argv[1:]]),
        "machine": {**machine.describe(), "threads": ", ".join(map(str, args.threads))},
        "load": [before, machine.load_average()],
        "other_load": other_load,
        "seconds": round(time.monotonic() - started),
        "failures": failures,
        "interrupted": interrupted,
        "groups": [g.as_json() for g in groups],
    }
    return document, groups


def main(argv: Sequence[str]) -> int:
    """Measure, print, write; the status is 130 after Ctrl-C, with what was measured until then, 1
    if a suite or a way failed or is wrong, else 0.

    A goal that is missed does not fail the run: whether the machine was quiet is for the reader.
    """
    args = _arguments(argv)
    document, groups = _measure(args)
    verdicts = judge(groups)
    document["goals"] = [
        {"what": v.goal.what, "reach": v.goal.reach, "measured": v.measured, "minima": v.minima,
         "verdict": v.text, "suite": v.group.suite, "case": v.group.case,
         "threads": v.group.threads, "allocator": v.group.allocator}
        for v in verdicts
    ]  # fmt: skip
    cautions = warnings(document, groups)
    document["warnings"] = cautions
    by_suite: dict[str, list[Group]] = {}
    for group in groups:
        by_suite.setdefault(group.suite, []).append(group)
    details = [suite_table(suite, members) for suite, members in by_suite.items()]
    goals, facts = goal_table(verdicts), machine_table(document)

    for table in (*details, facts, goals):
        tables.show(table)
    for text in cautions:
        print(f"warning: {text}")
    missed = sum(v.passed is False for v in verdicts)
    print(f"{document['command']}: {len(verdicts)} goals, {missed} missed, {document['seconds']} s")
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(as_markdown(document, (goals, facts, *details), cautions))
    if document["interrupted"]:
        return INTERRUPTED
    return int(bool(document["failures"]) or any(not e.ranked for g in groups for e in g.entries))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
