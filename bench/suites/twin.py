"""Price of reproducibility: compiles and runs ``bench/twin.cpp`` for each vector tier.

Timed, in C++: the rows of a batch of 8 MiB, in place, on one thread. See the program's head.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from suite_settings import Settings, progress

from mbkern import _C
from mbkern.bench.allocator import DEFAULT
from mbkern.bench.results import Entry, Group

STATES = (DEFAULT,)
SUITE = "twin"
CANONICAL, PLAIN = "canonical", "plain"

_ROOT = Path(__file__).resolve().parents[2]
_INTERLEAVED = ["-fschedule-insns", "-falign-functions=64", "-falign-loops=64"]
_FLAGS = {
    "avx512": ["-march=x86-64-v4", "-Wno-uninitialized", *_INTERLEAVED],
    "avx2": ["-march=x86-64-v3", *_INTERLEAVED, "-fsched-pressure"],
}  # as in CMakeLists.txt, for gcc
_COMMON = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def _compile(isa: str, folder: Path) -> Path:
    program = folder / f"twin_{isa}"
    command = [
        os.environ.get("CXX", "g++"), *_COMMON, *_FLAGS.get(isa, []), f"-DMBK_ISA={isa}",
        "-Wno-psabi", "-I", "csrc", "bench/twin.cpp", "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, cwd=_ROOT, check=True)  # errors of the compiler go to stderr
    return program


def _groups(isa: str, output: str, allocator: str) -> list[Group]:
    groups: dict[str, Group] = {}
    for line in output.splitlines():
        columns, name, error, *samples = line.split()
        case = f"{isa}, V = {columns}"
        group = groups.setdefault(
            case,
            Group(SUITE, case, 1, allocator, "ns/element", PLAIN, [], int(columns)),
        )
        entry = Entry(name, [float(s) for s in samples], float(error))
        entry.correct = float(error) < 2e-5
        group.entries.append(entry)
    return list(groups.values())


def run(settings: Settings) -> list[Group]:
    """All row lengths, for each vector tier of this machine."""
    milliseconds = 200 if settings.quick else 1500
    groups = []
    with tempfile.TemporaryDirectory() as folder:
        for isa in [isa for isa in _C.isas() if isa != "scalar"] or _C.isas():
            progress(isa, 1)
            try:
                program = _compile(isa, Path(folder))
            except OSError as failure:  # no compiler
                skipped = Entry(CANONICAL, note=f"skipped: {failure}")
                groups.append(
                    Group(SUITE, isa, 1, settings.allocator, "ns/element", PLAIN, [skipped])
                )
                continue
            done = subprocess.run(
                [str(program), str(milliseconds), "--raw"],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            groups += _groups(isa, done.stdout, settings.allocator)
    return groups
