"""``python -m mbkern plan SCRIPT.py:factory --batch 512``."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path

from mbkern._plan_fit import SHARES
from mbkern._planner import plan

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def memory_size(text: str) -> int:
    """Bytes of ``1500000``, ``800M``, ``2.5GiB``; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 800M or 2.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument(
        "factory", metavar="SCRIPT.py:factory",
        help="a function without arguments that returns (step, sample), see help(mbkern.plan)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, required=True, help="items of the mini-batch")
    parser.add_argument("--memory-limit", type=memory_size, metavar="SIZE", help="such as 2.5GiB")
    parser.add_argument("--objective", choices=list(SHARES), default="throughput")
    parser.add_argument("--noise-scale", type=float, metavar="ITEMS", help="of the gradient")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure, about")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curve there")


def run(args: argparse.Namespace) -> int:
    """Plan and print; 1: there is no plan, 2: there is no such script or function."""
    script, _, name = args.factory.rpartition(":")
    if not script or not Path(script).is_file():
        print(f"mbkern plan: no file {script!r}; give SCRIPT.py:factory", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(script).resolve().parent))
    factory = runpy.run_path(script, run_name="mbkern_plan").get(name)
    if not callable(factory):
        print(f"mbkern plan: {script} has no function {name!r}", file=sys.stderr)
        return 2
    step, sample = factory()
    try:
        found = plan(
            step, sample, args.batch, memory_limit=args.memory_limit, objective=args.objective,
            noise_scale=args.noise_scale, seconds=args.seconds,
        )  # fmt: skip
    except (MemoryError, ValueError) as error:
        print(f"mbkern plan: {str(error).removeprefix('mbkern: ')}", file=sys.stderr)
        return 1
    print(found)
    if args.json:
        args.json.write_text(found.to_json() + "\n")
    if args.png:
        found.save_png(args.png)
    return 0
