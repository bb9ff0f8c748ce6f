"""What only a GPU can show, stage by stage: ``python bench/gpu_check.py [--stage NAME ...]``.

    build     build and install with this Python, offline; the doctor; the machine code
    bits      elementary functions over all 2^32 inputs, then every golden digest, on the GPU
    test      tests that need a GPU, then the others
    sanitize  compute-sanitizer's four tools over small calls
    bench     speed against copies, torch, and the peers that are installed

Every stage runs in a process of its own, takes at most eight minutes (``--seconds``: fewer), and
adds its part to one file a GPU and day under bench/results/; stages may run side by side. Without a
GPU nothing is checked and nothing is written; with ``--rehearse`` each stage then does what it can
on the CPU. The status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from gpu.stage import FAILED, LIMIT, NOT_RUN, PASSED, Clock, Report, python, run

REHEARSED = "rehearsed"


def _build(clock: Clock, rehearse: bool) -> Report:
    from gpu import build

    return build.check(clock)


def _bits(clock: Clock, rehearse: bool) -> Report:
    from gpu import bits

    if rehearse:
        return bits.rehearse(clock)
    command = python("-m", "mbkern", "selftest", "--device", "cuda")
    with ThreadPoolExecutor(1) as pool:
        selftest = pool.submit(run, command, clock.left())
        report = bits.check("cuda", clock)
        golden = selftest.result()
    print(golden.output)
    report.details["golden"] = golden.ending()
    if not golden.good:
        reasons = [report.reason, f"golden digests: {golden.failure()}"]
        report.verdict, report.reason = FAILED, "; ".join(filter(None, reasons))
    return report


def _test(clock: Clock, rehearse: bool) -> Report:
    from gpu import tests

    return tests.rehearse(clock) if rehearse else tests.check(clock)


def _sanitize(clock: Clock, rehearse: bool) -> Report:
    from gpu import sanitize

    return sanitize.rehearse(clock) if rehearse else sanitize.check(clock)


def _bench(clock: Clock, rehearse: bool) -> Report:
    from gpu import bench

    return bench.rehearse(clock) if rehearse else bench.check("cuda", clock)


STAGES: dict[str, Callable[[Clock, bool], Report]] = {
    "build": _build, "bits": _bits, "test": _test, "sanitize": _sanitize, "bench": _bench,
}  # fmt: skip


def _child(stage: str, rehearse: bool, answer: Path, seconds: float) -> int:
    """A stage in this process: its report, and the machine that it ran on, as JSON."""
    from gpu import machine

    reason = machine.missing()
    if reason and not rehearse:
        report = Report(NOT_RUN, reason)
    else:
        report = STAGES[stage](Clock(seconds), rehearse)
    facts = {} if reason else machine.fingerprint()
    answer.write_text(json.dumps({"report": asdict(report), "machine": facts}))
    return 0


def _run(stage: str, rehearse: bool, folder: Path | None, seconds: float) -> Report:
    """A stage in a process of its own; a crash or a lack of time is a failure."""
    print(f"==== {stage}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "answer.json"
        flags = ["--seconds", str(seconds), *["--rehearse"] * rehearse]
        done = run(python(__file__, "--child", stage, answer, *flags), seconds + 30, show=True)
        if not answer.exists():
            return Report(FAILED, f"the stage ended without a report: {done.failure()}")
        found = json.loads(answer.read_text())
    report, facts = Report(**found["report"]), found["machine"]
    if facts and not rehearse:
        from gpu import results

        where = results.add(stage, report, facts, *([folder] if folder else []))
        print(f"written: {where}")
    return report


def main(argv: Sequence[str]) -> int:
    """Run the stages and say what came out, last line first to be read."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--stage", action="append", choices=STAGES, help="which stage; repeatable (default: all)")
    add("--rehearse", action="store_true", help="on the CPU: do the stages run at all?")
    add("--results", type=Path, metavar="FOLDER", help="where the results file goes")
    add("--seconds", type=float, default=LIMIT, help="for each stage (default: %(default)s)")
    add("--child", nargs=2, metavar=("STAGE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if find_spec("torch") is None:
        print("no torch in this Python: nothing was checked")
        return 1
    if args.child:
        return _child(args.child[0], args.rehearse, Path(args.child[1]), args.seconds)

    reports = {
        name: _run(name, args.rehearse, args.results, args.seconds) for name in args.stage or STAGES
    }
    print()
    for name, report in reports.items():
        verdict = REHEARSED if args.rehearse and report.verdict == PASSED else report.verdict
        print(f"{name:<10} {verdict}{': ' * bool(report.reason)}{report.reason}")
    verdicts = [report.verdict for report in reports.values()]
    if FAILED in verdicts:
        print(f"{verdicts.count(FAILED)} of {len(verdicts)} stages FAILED")
        return 1
    if args.rehearse:
        print("a rehearsal on the CPU: nothing was checked on a GPU")
    elif PASSED not in verdicts:
        print("nothing was checked")
    else:
        print(f"{verdicts.count(PASSED)} of {len(verdicts)} stages passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
