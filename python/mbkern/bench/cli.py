"""The command line of ``python -m mbkern bench``.

Exit status: 0 all is well; 1 a result was wrong, a provider failed, or a comparison did; 2 the
command line was not understood, or something is not installed; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from mbkern._cli import INTERRUPTED
from mbkern.bench import tables
from mbkern.bench.allocator import DEFAULT, RECYCLED
from mbkern.bench.models import MODELS
from mbkern.bench.problem import Plan

SHORT = ("cross_entropy", "pointwise", "rows", "linear_cross_entropy", "accumulate", "flush",
         "overhead")  # fmt: skip
MISSING = "mbkern bench: {what} needs {module}, which is not installed: pip install 'mbkern[bench]'"


def _threads(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _some_of(*known: str) -> Callable[[str], tuple[str, ...]]:
    """Reads names, and says which there are where one is unknown."""

    def read(text: str) -> tuple[str, ...]:
        for name in (names := _names(text)):
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown name {name!r}; there are {', '.join(known)}"
                )
        return names

    return read


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from mbkern.bench.suites import SUITES

    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}, or all")
    add("--short", action="store_true", help="few and small cases: five minutes on two cores")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--threads", type=_threads, metavar="N,...",
        help="numbers of threads, as in 1,2 (default: 1 and all; short: all)")  # fmt: skip
    add(
        "--allocators",
        type=_some_of(DEFAULT, RECYCLED),
        metavar="STATE,...",
        help="of default,recycled: large results in fresh pages, or in used ones (default: both; "
        "a GPU has one state)",
    )
    add("--seconds", type=_seconds, help="measuring time of a case (default 1; short 0.3)")
    add("--repeats", type=_count, help="samples of each provider, instead of a time")
    add("--compile", action="store_true", help="torch.compile, too; it compiles for 10 s a case")
    add("--cache", choices=("warm", "cold"), default="warm", help="cold: swept before each run")
    add(
        "--providers",
        type=_names,
        default=(),
        metavar="NAME,...",
        help="only those whose names contain one of these",
    )
    add("--model", choices=tuple(MODELS), default="", help="only this model's sizes")
    add(
        "--loss",
        default="cross_entropy",
        help="of the suites minibatch and scaling (default %(default)s)",
    )
    directions = ("both", "forward", "backward")
    add("--directions", type=_some_of(*directions), default=(), metavar="PASS,...",
        help=f"of {','.join(directions)} (default: all)")  # fmt: skip
    add("--suite-file", type=Path, metavar="FILE", help="Python with SUITES of your own, by name")


def _plan(
    args: argparse.Namespace, default: Sequence[str], parser: argparse.ArgumentParser
) -> Plan:
    """What was asked for; ends the program with status 2 where there is no such thing."""
    from mbkern.bench.suites import SUITES

    cpus = len(os.sched_getaffinity(0))
    suites = tuple(args.suites) or tuple(default)
    if "all" in suites:
        suites = tuple(SUITES)
    _check(args, suites, parser)
    threads = args.threads or ((cpus,) if args.short else tuple(sorted({1, cpus})))
    if args.device == "cuda":
        threads = (1,)
    elif max(threads) > cpus:
        print(f"warning: {max(threads)} threads share {cpus} CPUs", file=sys.stderr)
    seconds = args.seconds or (0.3 if args.short else 1.0)
    return Plan(
        suites, args.device, "default", threads, args.short, seconds, min(0.3, seconds / 4),
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


def _check_output(path: Path | None, parser: argparse.ArgumentParser) -> None:
    """Before anything is measured, not after."""
    try:
        if path is not None:
            path.open("ab").close()
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}")


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
    _check_output(args.output, parser)
    from mbkern.bench import run

    if not tables.HAS_RICH:
        print(MISSING.format(what="a drawn table", module="rich"), file=sys.stderr)
    recorder = run.Recorder(args.output)
    run.run(plan, args.allocators or run.states(plan), recorder)
    run.show(recorder.rows, shlex.join(["python", "-m", "mbkern", "bench", *argv]))
    return run.status(recorder)


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
        "--fail-if", metavar="slower:5%", default="",
        help="the status is 1 if a case is that: B slower than A by more than 5 %%",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        rule = compare.Rule.parse(args.fail_if) if args.fail_if else compare.Rule()
        (a, b), warnings = compare.read((args.a, args.b))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    warnings += compare.differences(a, b)
    return _judge(a, b, rule if args.fail_if else None, rule.threshold, warnings)


def _judge(a: list, b: list, rule: object, threshold: float, warnings: Sequence[str]) -> int:  # type: ignore[type-arg]
    from mbkern.bench import compare

    found = compare.compare(a, b, threshold)
    tables.show(compare.table(found, threshold))
    for text in warnings:
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
    return int(isinstance(rule, compare.Rule) and bool(compare.failing(found, rule)))


def _ab(argv: Sequence[str]) -> int:
    from mbkern.bench import ab, compare, run, session

    parser = argparse.ArgumentParser(prog="python -m mbkern bench ab", description=ab.__doc__)
    parser.add_argument("--a", required=True, metavar="PYTHON", help="with the one build of mbkern")
    parser.add_argument("--b", required=True, metavar="PYTHON", help="with the other")
    for side in "ab":
        parser.add_argument(
            f"--output-{side}", type=Path, default=Path(f"{side}.jsonl"), metavar="FILE",
            help=f"append the rows of {side.upper()} there (default %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--processes", type=_count, default=ab.PROCESSES,
        help="of each build, in turn (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--fail-if", metavar="slower:5%", default="",
        help="the status is 1 if a case is that: B slower than A by more than 5 %%",
    )  # fmt: skip
    _add_plan(parser)
    args = parser.parse_args(argv)
    plan = _plan(args, ("cross_entropy", "overhead"), parser)
    try:
        rule = compare.Rule.parse(args.fail_if) if args.fail_if else compare.Rule()
        for name, python in (("A", args.a), ("B", args.b)):
            print(f"{name}: {session.interpreter(python)}", file=sys.stderr)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error).removeprefix("mbkern bench: "))
    for path in (args.output_a, args.output_b):
        _check_output(path, parser)
    pair = secrets.token_hex(6)
    recorders = [run.Recorder(path, pair) for path in (args.output_a, args.output_b)]
    try:
        ab.run(plan, (args.a, args.b), recorders, args.processes)
    except RuntimeError as error:
        print(f"mbkern bench ab: {error}", file=sys.stderr)
        return 1
    a, b = (recorder.rows for recorder in recorders)
    status = _judge(a, b, rule if args.fail_if else None, rule.threshold, ())
    return INTERRUPTED if recorders[0].interrupted else status


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
