"""Whether the compiler fused, flushed or approximated what the CUDA sources do not ask for.

Each source is compiled to PTX once more, by the very command of the build, with mark_fma.h included
first: an explicit fma then carries a mark. The argument has two steps.

1. From the source to PTX: a product and a sum that the compiler fused is an fma without a mark, and
   there must be none.
2. From PTX to machine code: PTX allows ptxas to fuse mul and add only where they name no rounding;
   with ``.rn`` each is rounded for itself (PTX ISA, "mul" and "add"). So every one must name it.

Divisions, square roots and reciprocals are instructions of PTX: ``.rn`` is exact, ``.approx`` and
``.full`` are not. ptxas expands the exact ones with fmas of its own. ``.ftz`` flushes to zero.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "asked for"
PTX = "--gpu-architecture=compute_90"

_FAULTS = {
    "fused": re.compile(rf"\s(fma|mad)\.(?!lo|hi|wide)(?!.*{MARK})"),
    "may be fused": re.compile(r"\s(add|sub|mul)\.(?!r[nzmp]\b)((sat|ftz)\.)*(f|bf)\d+"),
    "approximated": re.compile(r"\.(approx|full)\b"),
    "flushed": re.compile(r"\.ftz\b"),
}


def ptx_problems(ptx: str) -> list[str]:
    """Faulty instructions, one line each, with the kernel that they are in."""
    found, kernel = [], ""
    for line in ptx.splitlines():
        if entry := re.search(r"\.(?:entry|func)\b.*?(\w+)\($", line):
            kernel = entry[1]
        for what, fault in _FAULTS.items():
            if fault.search(line):
                found.append(f"{kernel}: {what}: {line.strip()}")
    return found


def compile_ptx(command: Sequence[str], source: Path, folder: Path) -> str:
    """PTX of a source, with marks, by nvcc with the flags of this command."""
    kept = [a for a in command if not a.startswith(("--generate-code", "-gencode", "-arch"))]
    output = folder / f"{source.stem}.ptx"
    mark = ROOT / "tests/native/mark_fma.h"
    done = subprocess.run(
        [*kept, PTX, "-include", str(mark), "-ptx", str(source), "-o", str(output)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{source} does not compile to PTX: {done.stderr}")
    return output.read_text()


def build_commands(build: Path) -> dict[Path, list[str]]:
    """For each CUDA source of a build: nvcc, and its flags without what is compiled to where."""
    commands = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if source.suffix == ".cu":
            words = shlex.split(entry["command"])
            words = words[next(k for k, w in enumerate(words) if Path(w).name == "nvcc") :]
            commands[source] = words[: words.index("-x")]
    return commands


def newest_build() -> Path | None:
    """The build of this Python's package that was configured last."""
    tree = f"build/cp{sys.version_info.major}{sys.version_info.minor}-*/compile_commands.json"
    found = sorted(ROOT.glob(tree), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None
