"""``python -m mbkern plan SCRIPT.py:factory --batch 512``."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from mbkern._plan_fit import SHARES
from mbkern._plan_measure import Source
from mbkern._plan_picture import NEEDS
from mbkern._plan_result import Plan
from mbkern._planner import plan

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def memory_size(text: str) -> int:
    """Bytes of ``1500000``, ``800M``, ``2.5GiB``; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 800M or 2.5GiB")
    size = float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(size):
        raise argparse.ArgumentTypeError("that is no size that a memory can have")
    return int(size)


def _count(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) < 1 << 53:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of items")
    return int(text)


def _number(text: str) -> float:
    """Finite, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number of at least 0")
    return value


def _noise_scale(text: str) -> float:
    """Positive; NaN is an estimate that is not known yet."""
    if text.strip().lower() == "nan":
        return math.nan
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a noise scale of 0 items is none")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument(
        "factory", metavar="SCRIPT.py:factory",
        help="a function without arguments that returns (step, sample), see help(mbkern.plan)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=_count, metavar="ITEMS", required=True, help="items of the mini-batch"
    )
    parser.add_argument(
        "--memory-limit", type=memory_size, metavar="SIZE",
        help="such as 2.5GiB, of all that is in use at the peak (default: nine tenths of what is "
        "free, and what is in use now)",
    )  # fmt: skip
    parser.add_argument(
        "--objective", choices=list(SHARES), default="throughput",
        help="throughput (default): the smallest size that is about as fast as any; memory: one "
        "that is four fifths as fast",
    )  # fmt: skip
    parser.add_argument(
        "--noise-scale", type=_noise_scale, metavar="ITEMS",
        help="of the gradient, if known: are two steps of half the batch better?",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=_number, default=20.0, help="to measure, about (default %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curve there")


class _Refused(Exception):
    """Why the command cannot be carried out as it was given."""


def run(args: argparse.Namespace) -> int:
    """Plan and print; 1: there is no plan, 2: the script, or a file to write, is not usable."""
    try:
        _check_outputs(args.json, args.png)
        step, sample = _from_factory(args.factory)
    except _Refused as refused:
        return _failed(refused, 2)
    try:
        found = plan(
            step, sample, args.batch, memory_limit=args.memory_limit, objective=args.objective,
            noise_scale=args.noise_scale, seconds=args.seconds,
        )  # fmt: skip
    except (Exception, SystemExit) as error:
        if _theirs(error.__traceback__) is not None:
            return _failed(f"step or sample of {args.factory} raised:\n{_told(error)}", 1)
        if isinstance(error, MemoryError | ValueError | TypeError | NotImplementedError):
            return _failed(error, 1)
        raise
    print(found)
    return _write(found, args.json, args.png)


def _failed(message: object, status: int) -> int:
    print(f"mbkern plan: {str(message).removeprefix('mbkern: ')}", file=sys.stderr)
    return status


def _from_factory(words: str) -> tuple[Any, Any]:
    """Step and sample of ``SCRIPT.py:factory``."""
    script, _, name = words.rpartition(":")
    if not script:
        raise _Refused(f"{words!r} names no factory; give SCRIPT.py:factory")
    if not _is_file(Path(script)):
        raise _Refused(f"no file {script!r}; give SCRIPT.py:factory")
    sys.path.insert(0, str(Path(script).resolve().parent))
    module = ModuleType("mbkern_plan")
    module.__file__ = script
    sys.modules[module.__name__] = module  # where pickle and dataclasses look for it
    try:
        exec(compile(Path(script).read_bytes(), script, "exec"), vars(module))
        factory = getattr(module, name, None)
    except (Exception, SystemExit) as error:
        raise _Refused(f"{script} raised:\n{_told(error)}") from error
    if not callable(factory):
        raise _Refused(f"{script} has no function {name!r}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise _Refused(f"{words} raised:\n{_told(error)}") from error
    if not isinstance(made, tuple | list) or len(made) != 2:
        of = f" of {len(made)}" if isinstance(made, tuple | list) else ""
        raise _Refused(f"{words} must return (step, sample), not {type(made).__name__}{of}")
    step, sample = made
    if not callable(step):
        raise _Refused(f"{words} must return a function as its step, not {type(step).__name__}")
    try:
        Source(sample)
    except (TypeError, ValueError) as error:
        raise _Refused(f"the sample of {words}: {str(error).removeprefix('mbkern: ')}") from error
    return step, sample


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be looked into
        return False


def _theirs(frames: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame that is the user's; None if all are ours."""
    while frames is not None:
        module = frames.tb_frame.f_globals.get("__name__") or ""
        if module.split(".")[0] != "mbkern":
            return frames
        frames = frames.tb_next
    return None


def _told(error: BaseException) -> str:
    """The error as Python prints it, without our part of the way there."""
    lines = traceback.format_exception(type(error), error, _theirs(error.__traceback__))
    return "".join(lines).rstrip()


def _check_outputs(json: Path | None, png: Path | None) -> None:
    """Measuring takes long: what cannot be written is found before."""
    if json is not None and png is not None and os.path.realpath(json) == os.path.realpath(png):
        raise _Refused(f"--json and --png are one file, {json}")
    for path in (json, png):
        if path is not None:
            try:
                _try_to_write(path)
            except OSError as error:
                raise _Refused(f"cannot write {path}: {error.strerror}") from error
    if png is not None and importlib.util.find_spec("matplotlib") is None:
        raise _Refused(NEEDS)


def _try_to_write(path: Path) -> None:
    """Raise if a file cannot be written; leaves it as it was."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe: its reader would see the end
    if path.exists():
        path.open("ab").close()
        return
    target = Path(os.path.realpath(path))  # not the link to it, which is to stay
    target.open("xb").close()
    target.unlink()


def _write(found: Plan, json: Path | None, png: Path | None) -> int:
    path = json
    try:
        if json is not None:
            json.write_text(found.to_json() + "\n")
        path = png
        if png is not None:
            found.save_png(png)
    except OSError as error:
        return _failed(f"cannot write {path}: {error.strerror}", 2)
    return 0
