"""The command line of ``python -m mbkern bench``.

Exit status: 0 all is well; 1 a result was wrong, a provider failed, or a comparison did; 2 the
command line was not understood, or something is not installed; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mbkern._cli import INTERRUPTED
from mbkern.bench import tables
from mbkern.bench.allocator import DEFAULT, RECYCLED
from mbkern.bench.arguments import check_output, count, counts, names, seconds, some_of
from mbkern.bench.models import MODELS
from mbkern.bench.problem import Plan

if TYPE_CHECKING:
    from mbkern.bench.compare import Rule
    from mbkern.bench.rows import Row

SHORT = ("cross_entropy", "pointwise", "rows", "linear_cross_entropy", "accumulate", "flush",
         "overhead")  # fmt: skip
MISSING = "mbkern bench: {what} needs {module}, which is not installed: pip install 'mbkern[bench]'"


def _add_plan(parser: argparse.ArgumentParser, states: str = "both") -> None:
    """Options of what is measured; ``states``: of the allocator, what is said of the default."""
    from mbkern.bench.suites import SUITES

    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}, or all")
    add("--short", action="store_true", help="few and small cases: five minutes on two cores")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--threads", type=counts, metavar="N,...",
        help="numbers of threads of a CPU, as in 1,2 (default: 1 and all; short: all)")  # fmt: skip
    add(
        "--allocators",
        type=some_of(DEFAULT, RECYCLED),
        metavar="STATE,...",
        help="of default,recycled: large results in fresh pages, or in used ones "
        f"(default: {states}; a GPU has one state)",
    )
    add("--seconds", type=seconds, help="measuring time of a case (default 1; short 0.3)")
    add("--repeats", type=count, help="samples of each provider, instead of a time")
    add("--compile", action="store_true",
        help="torch.compile, too, in cross_entropy, pointwise and rows; it compiles for 10 s a "
        "case")  # fmt: skip
    add("--cache", choices=("warm", "cold"), default="warm", help="cold: swept before each run")
    add(
        "--providers",
        type=names,
        default=(),
        metavar="NAME,...",
        help="only those whose names contain one of these",
    )
    add("--model", choices=tuple(MODELS), default="",
        help="only this model's sizes, in suites that have sizes of models")  # fmt: skip
    add(
        "--loss",
        default="cross_entropy",
        help="of the suites minibatch and scaling (default %(default)s)",
    )
    directions = ("both", "forward", "backward")
    add("--directions", type=some_of(*directions), default=(), metavar="PASS,...",
        help=f"of {','.join(directions)} (default: all)")  # fmt: skip
    add("--suite-file", type=Path, metavar="FILE", help="Python with SUITES of your own, by name")


def _plan(
    args: argparse.Namespace, default: Sequence[str], parser: argparse.ArgumentParser
) -> Plan:
    """What was asked for; ends the program with status 2 where there is no such thing."""
    from mbkern.bench.suites import SUITES

    cpus = len(os.sched_getaffinity(0))
    asked = args.suites or default
    suites = tuple(
        dict.fromkeys(s for name in asked for s in (SUITES if name == "all" else [name]))
    )
    _check(args, suites, parser)
    threads = args.threads or ((cpus,) if args.short else tuple(sorted({1, cpus})))
    if args.device == "cuda":
        if args.threads:
            print("warning: --threads is not used: a GPU has none to choose", file=sys.stderr)
        threads = (1,)
    elif max(threads) > cpus:
        print(f"warning: {max(threads)} threads share {cpus} CPUs", file=sys.stderr)
    time = args.seconds or (0.3 if args.short else 1.0)
    return Plan(
        suites, args.device, DEFAULT, threads, args.short, time, min(0.3, time / 4),
        5 if args.short else 7, args.repeats, args.compile, args.cache, args.providers, args.model,
        args.loss, args.directions, str(args.suite_file.resolve()) if args.suite_file else "",
    )  # fmt: skip


def _check(
    args: argparse.Namespace, suites: Sequence[str], parser: argparse.ArgumentParser
) -> None:
    from mbkern.bench.formulas import FORMULAS
    from mbkern.bench.suites import SUITES

    unknown = [s for s in suites if s not in SUITES]
    if unknown and not args.suite_file:
        parser.error(
            f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}, all; and the commands "
            f"{', '.join(COMMANDS)}, before any option"
        )
    if args.suite_file and not args.suite_file.is_file():
        parser.error(f"--suite-file: there is no file {args.suite_file}")
    if {"minibatch", "scaling"} & set(suites) and args.loss not in FORMULAS:
        parser.error(f"--loss: unknown loss {args.loss!r}; there are {', '.join(FORMULAS)}")
    if args.device == "cuda" and not _has_cuda():
        parser.error("--device cuda: torch sees no GPU here")


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mbkern bench",
        description="Measure the losses of mbkern beside torch's, other libraries', and the "
        "machine's own limits.",
        epilog="Other commands: bench compare, bench ab, bench report; each has --help.",
    )
    _add_plan(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="append rows as JSON lines")
    args = parser.parse_args(argv)
    plan = _plan(args, SHORT, parser)
    check_output(args.output, parser)
    from mbkern.bench import run

    if not tables.HAS_RICH:
        print(MISSING.format(what="a drawn table", module="rich"), file=sys.stderr)
    recorder = run.Recorder(args.output)
    run.run(plan, args.allocators or run.states(plan), recorder)
    run.show(recorder.rows, shlex.join(["python", "-m", "mbkern", "bench", *argv]))
    return run.status(recorder, plan.only)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _compare(argv: Sequence[str]) -> int:
    from mbkern.bench import compare

    parser = argparse.ArgumentParser(
        prog="python -m mbkern bench compare", description=compare.__doc__
    )
    parser.add_argument("a", type=Path, metavar="A.jsonl")
    parser.add_argument("b", type=Path, metavar="B.jsonl")
    parser.add_argument(
        "--fail-if", metavar="slower:5%",
        help="the status is 1 if a case is that: B slower than A by more than 5 %%",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        rule = _rule(args.fail_if)
        (a, b), warnings = compare.read((args.a, args.b))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    warnings += compare.differences(a, b)
    return _judge((a, b), rule, warnings)


def _rule(text: str | None) -> Rule | None:
    """None where nothing is to fail; ValueError where it is not understood."""
    from mbkern.bench.compare import Rule

    return None if text is None else Rule.parse(text)


def _judge(sides: tuple[list[Row], list[Row]], rule: Rule | None, warnings: Sequence[str]) -> int:
    from mbkern.bench import compare, display
    from mbkern.bench.rows import latest

    threshold = (rule or compare.Rule()).threshold
    found = compare.compare(*sides, threshold)
    tables.show(compare.table(found, threshold))
    of_sides = [
        f"{side}: {text}"
        for side, rows in zip("AB", sides, strict=True)
        for text in display.warnings(list(latest(rows).values()))
    ]
    for text in (*warnings, *compare.doubts(found), *of_sides):
        print(f"warning: {text}")
    counts = {v: sum(c.verdict == v for c in found) for v in
              (compare.FASTER, compare.SLOWER, compare.SAME, compare.UNDECIDED,
               compare.NOT_COMPARED)}  # fmt: skip
    print(", ".join(f"{n} {v}" for v, n in counts.items()))
    lost = sum(c.lost for c in found)
    if lost:
        print(f"A has a time, and B has none: {lost}")
    if not any(c.ratio for c in found):
        print("nothing to compare: the files have no case and provider in common")
        return 1
    return int(rule is not None and bool(compare.failing(found, rule)))


def _ab(argv: Sequence[str]) -> int:
    from mbkern.bench import ab, run, session

    parser = argparse.ArgumentParser(prog="python -m mbkern bench ab", description=ab.__doc__)
    parser.add_argument("--a", required=True, metavar="PYTHON", help="with the one build of mbkern")
    parser.add_argument("--b", required=True, metavar="PYTHON", help="with the other")
    for side in "ab":
        parser.add_argument(
            f"--output-{side}", type=Path, default=Path(f"{side}.jsonl"), metavar="FILE",
            help=f"append the rows of {side.upper()} there (default %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--processes", type=count, default=ab.PROCESSES,
        help="of each build, in turn (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--fail-if", metavar="slower:5%",
        help="the status is 1 if a case is that: B slower than A by more than 5 %%",
    )  # fmt: skip
    _add_plan(parser, states=DEFAULT)
    args = parser.parse_args(argv)
    plan = _plan(args, ("cross_entropy", "overhead"), parser)
    if args.output_a.resolve() == args.output_b.resolve():
        parser.error(f"the rows of A and B would lie in one file, {args.output_a}")
    pythons = [session.located(python) for python in (args.a, args.b)]
    try:
        rule = _rule(args.fail_if)
        folders = [session.interpreter(python) for python in pythons]
    except (ValueError, RuntimeError) as error:
        parser.error(str(error).removeprefix("mbkern bench: "))
    for name, folder in zip("AB", folders, strict=True):
        print(f"{name}: {folder}", file=sys.stderr)
    if folders[0] == folders[1]:
        print("warning: A and B are one build", file=sys.stderr)
    for path in (args.output_a, args.output_b):
        check_output(path, parser)
    pair = secrets.token_hex(6)
    recorders = [run.Recorder(path, pair) for path in (args.output_a, args.output_b)]
    try:
        for state in args.allocators or (DEFAULT,):
            if not recorders[0].interrupted:
                ab.run(replace(plan, allocator=state), pythons, recorders, args.processes)
    except RuntimeError as error:
        print(f"mbkern bench ab: {error}", file=sys.stderr)
        return 1
    status = _judge((recorders[0].rows, recorders[1].rows), rule, ())
    if recorders[0].interrupted:
        return INTERRUPTED
    return status or int(any(recorder.unwritten for recorder in recorders))


def _report(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mbkern bench report",
        description="One self-contained HTML page with interactive plots, the plots as PNG and "
        "SVG, and Markdown tables, of files that bench --output wrote.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="FOLDER",
                        help="write there (default %(default)s)")  # fmt: skip
    parser.add_argument("--title", default="Benchmarks of mbkern", help="of the page")
    args = parser.parse_args(argv)
    for module, what in (("plotly", "the page"), ("matplotlib", "a picture")):
        if find_spec(module) is None:
            print(MISSING.format(what=what, module=module), file=sys.stderr)
            return 2
    from mbkern.bench.report.write import report

    try:
        written, warnings = report(args.files, args.output, args.title)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    print(f"{written[0]}, and {len(written) - 1} other files beside it")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": _compare, "ab": _ab, "report": _report,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run suites, or one of the commands."""
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return _run(argv)
    except KeyboardInterrupt:  # before there is anything to keep, or while it is shown
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
