"""The command line, ``python -m mbkern <command>``: what is installed here, and does it work?

Exit status: 0 all is well, 1 a check failed, 2 the command line was not understood, 130 Ctrl-C,
141 the reader has gone (``| head``).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

INTERRUPTED, UNREAD = 130, 141  # the exit status, as shells have it


def _doctor(args: argparse.Namespace) -> int:
    from mbkern import _doctor

    return _doctor.run(as_json=args.json)


def _selftest(args: argparse.Namespace) -> int:
    from mbkern import _selftest

    return _selftest.run(write_golden=args.write_golden, device=args.device)


def _parser() -> argparse.ArgumentParser:
    from mbkern import NUMERICS_VERSION, __version__

    parser = argparse.ArgumentParser(
        prog="python -m mbkern",
        description="What is installed here, does it work, how fast is it, and which micro-batch?",
        epilog="Each command has --help.",
    )
    version = f"mbkern {__version__}, numerics version {NUMERICS_VERSION}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)

    doctor = commands.add_parser("doctor", help="print versions, devices, threads, and warnings")
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    doctor.set_defaults(run=_doctor)

    selftest = commands.add_parser("selftest", help="recompute the golden digests on this machine")
    selftest.add_argument(
        "--device", choices=("cpu", "cuda"), help="only the kernels of this device"
    )
    selftest.add_argument("--write-golden", action="store_true", help=argparse.SUPPRESS)
    selftest.set_defaults(run=_selftest)

    from mbkern import _plan_cli

    plan = commands.add_parser("plan", help="choose the micro-batch of a training step")
    _plan_cli.add_arguments(plan)
    plan.set_defaults(run=_plan_cli.run)

    commands.add_parser("bench", help="measure speed, compare and draw it", add_help=False)
    return parser


def _run(words: list[str]) -> int:
    if words[:1] == ["bench"]:  # which has commands and options of its own
        from mbkern.bench import cli

        return cli.main(words[1:])
    args = _parser().parse_args(words)
    status: int = args.run(args)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still held back would be written at exit, and raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    if status == INTERRUPTED:
        # A Ctrl-C that falls into exec() or eval() of a string (dataclasses, namedtuples) is on
        # record in CPython as not handled until the next exec(); the exit would be by the signal.
        exec("")
    return status
