"""The regression gate: instructions of small fixed calls, against budgets in the repository.

    python bench/instructions.py PROGRAM             status 1 if a case is over its budget
    python bench/instructions.py PROGRAM --update    write the budgets, and print what changed

PROGRAM is tests/native/instructions.cpp, built by ``make instructions``. It runs under valgrind's
callgrind, which counts the same on every run, so that a budget may be tight. Budgets are kept for
each compiler, since each makes other code. Without valgrind, or with a compiler that has no
budgets, nothing is checked, and it says so.
Fewer instructions are not always less time: that is what
``python -m mbkern bench ab`` is for.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

BUDGETS = Path(__file__).with_name("instructions.json")
SLACK = 0.01  # of a budget; the C library's part may differ between machines

Counts = dict[str, int]


class NotChecked(Exception):
    """Why nothing can be checked here."""


def compiler_of(cache: Path) -> str:
    """Name and major version of the compiler that a CMake build used; NotChecked if unknown."""
    files = sorted(cache.glob("CMakeFiles/*/CMakeCXXCompiler.cmake"))
    text = files[-1].read_text() if files else ""
    name = re.search(r'CMAKE_CXX_COMPILER_ID "(\w+)"', text)
    version = re.search(r'CMAKE_CXX_COMPILER_VERSION "(\d+)', text)
    machine = re.search(r'CMAKE_CXX_COMPILER_ARCHITECTURE_ID "(\w*)"', text)
    if not name or not version:
        raise NotChecked(f"no compiler is named in {cache}")
    return f"{name[1]} {version[1]} {machine[1] if machine else ''}".strip()


def read_dump(text: str) -> int:
    """The instructions of one dump of callgrind; ValueError if it has no sum."""
    found = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    if not found:
        raise ValueError("a dump of callgrind without totals")
    return int(found[1])


def count(program: Path) -> Counts:
    """Instructions inside ``measured``, for each case of the program, in order."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise NotChecked("valgrind is not installed")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/dump",
             "--toggle-collect=measured", "--dump-after=measured", str(program.resolve())],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program} failed under valgrind: {done.stderr[-2000:]}")
        names = done.stdout.splitlines()
        dumps = sorted(Path(folder).glob("dump.*"), key=lambda p: int(p.suffix[1:]))
        counts = [read_dump(dump.read_text()) for dump in dumps]
    if len(counts) < len(names):
        raise RuntimeError(f"{len(counts)} dumps for {len(names)} cases")
    return dict(zip(names, counts, strict=False))


def over(counts: Mapping[str, int], budgets: Mapping[str, int]) -> list[str]:
    """What is wrong, a line each: above its budget, without one, or no longer there."""
    found = []
    for name, n in counts.items():
        if name not in budgets:
            found.append(f"{name}: {n} instructions, and no budget")
        elif n > budgets[name] * (1 + SLACK):
            found.append(f"{name}: {n} instructions, {n / budgets[name] - 1:+.1%} of its budget")
    return found + [
        f"{name}: has a budget, but was not run" for name in budgets if name not in counts
    ]


def changes(counts: Mapping[str, int], budgets: Mapping[str, int]) -> list[str]:
    """Old and new, a line for each case."""
    lines = []
    for name, n in counts.items():
        old = budgets.get(name)
        change = "new" if old is None else f"{n / old - 1:+.2%} from {old}"
        lines.append(f"{name}: {n} ({change})")
    return lines + [f"{name}: gone" for name in budgets if name not in counts]


def main(argv: Sequence[str]) -> int:
    """Check or update; the status is 1 if a budget does not hold."""
    parser = argparse.ArgumentParser(
        prog="bench/instructions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", type=Path)
    parser.add_argument("--update", action="store_true", help="write the budgets")
    args = parser.parse_args(argv)
    budgets: dict[str, Counts] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    try:
        compiler = compiler_of(args.program.parent)
        if compiler not in budgets and not args.update:
            raise NotChecked(f"no budgets for {compiler}; there are {', '.join(budgets)}")
        counts = count(args.program)
    except NotChecked as reason:
        print(f"instructions: not checked: {reason}")
        return 0
    known = budgets.get(compiler, {})
    if args.update:
        print("\n".join(changes(counts, known)))
        budgets[compiler] = counts
        BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n")
        return 0
    wrong = over(counts, known)
    print("\n".join(wrong or [f"instructions: {len(counts)} cases within their budgets"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
