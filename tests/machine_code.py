"""What the machine code of the CUDA kernels must be like, checked without a GPU.

    python tests/machine_code.py [--write] [BINARY ...]    (default: the installed module)

prints what is wrong and what the kernels take; ``--write`` also writes registers and wide accesses
to machine_code.txt, which the tests compare with. Two compilers allocate registers differently, so
the table names its compiler, and is compared with that one's code only.

Of each rule, what it guards and why it is sound. contraction.py looks at PTX, one step earlier; the
two together leave no room.

- Special functions. MUFU gives approximations. Those of a reciprocal and a reciprocal square root
  are what exact divisions and square roots, and divisions of integers, start from; any other would
  be a result. That no reciprocal is used as it comes is seen in PTX.
- Flush to zero. ptxas flushes what PTX marks with ``.ftz``, and contraction.py finds that. Of its
  own it writes .FTZ where operands cannot be denormal: in exact square roots (FMUL, two for each
  MUFU.RSQ), in negations of exact reciprocals (FADD of -x and -0), in divisions of integers (F2I),
  and in slow paths (subroutines with names that begin with $) on scaled numbers.
- Half precision. HFMA2 and HADD2 would compute in 16 bits. ptxas uses them to load constants
  (0 * 0 + constant) and to widen fp16 (0 + x with .F32); both are exact.
- Atomics on floating numbers would make sums depend on the order of threads.
- Local memory holds spilled registers, and arrays whose index is not known at compile time.
- Kernels that stream tensors move 16 bytes an access: see WIDE.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cubin import Instruction, Kernel, kernels

TABLE = Path(__file__).with_name("machine_code.txt")
CONTRACTION_OFF = "-fmad false"
EXACT = {"RCP", "RSQ", "RCP64H", "RSQ64H"}  # starts of exact divisions and square roots
# Kernels that must have accesses of 16 bytes: rows kept in registers, element-wise losses in fp32,
# and of usual calls in 16 bits, too. Which others have none, and why: docs/cuda-notes.md.
WIDE = (r"^team_rows<.*, true>$", r"^pointwise<.*, float>$", r"^pointwise_dense<")


def _operands(i: Instruction) -> list[str]:
    return [part.strip() for part in i.operands.split(",")]


def _special(i: Instruction) -> bool:
    return i.opcode.startswith("MUFU.") and i.opcode.split(".")[1] not in EXACT


def _flushes(i: Instruction) -> bool:
    if (
        ".FTZ" not in i.opcode
        or i.routine.startswith("$")
        or i.opcode.startswith(("F2I.", "UF2I."))
    ):
        return False
    return not (i.opcode == "FADD.FTZ" and _operands(i)[2] == "-RZ")


def _half(i: Instruction) -> bool:
    if not i.opcode.startswith("H"):
        return False
    if i.opcode.startswith("HFMA2"):
        return _operands(i)[1:3] != ["-RZ", "RZ"]
    if i.opcode.startswith("HADD2.F32"):
        return _operands(i)[1] != "-RZ"
    return re.match(r"H(ADD2|MUL2|MNMX2|MMA)\b", i.opcode) is not None


def _float_atomic(i: Instruction) -> bool:
    return (
        i.opcode.startswith(("ATOM", "RED"))
        and re.search(r"\.(F16|F32|F64|BF16)", i.opcode) is not None
    )


def _local(i: Instruction) -> bool:
    return i.opcode.startswith(("LDL", "STL")) and i.opcode.split(".")[0] in ("LDL", "STL")


RULES = {
    "approximate function": _special,
    "flush to zero": _flushes,
    "arithmetic in half precision": _half,
    "atomic on floating numbers": _float_atomic,
    "local memory": _local,
}


def problems(kernel: Kernel) -> list[str]:
    """What is wrong with a kernel's code, a line for each rule."""
    found = []
    for what, broken in RULES.items():
        faulty = [i for i in kernel.code if broken(i)]
        if broken is _flushes and all(i.opcode == "FMUL.FTZ" for i in faulty):
            faulty = faulty[2 * kernel.count(r"MUFU\.RSQ$") :]
        if faulty:
            i = faulty[0]
            found.append(f"{what}: {len(faulty)}, first {i.opcode} {i.operands} at {i.address:#x}")
    if kernel.stack or kernel.local:
        found.append(f"local memory: {kernel.stack} bytes of stack, {kernel.local} of its own")
    if CONTRACTION_OFF not in kernel.flags:
        found.append(f"contraction: compiled with {kernel.flags or 'no flags'}")
    if any(re.search(name, kernel.name) for name in WIDE) and not (
        wide_loads(kernel) and wide_stores(kernel)
    ):
        found.append("no loads, or no stores, of 16 bytes")
    if not kernel.code:
        found.append("no code was read")
    return [f"{kernel.arch} {kernel.name}: {line}" for line in found]


def wide_loads(kernel: Kernel) -> int:
    """Global loads of 16 bytes: to registers, asynchronous to shared memory, or in bulk."""
    return kernel.count(r"LDG\.(\w+\.)*128|LDGSTS\.(\w+\.)*128|UBLKCP|UTMALDG")


def wide_stores(kernel: Kernel) -> int:
    """Global stores of 16 bytes, or in bulk."""
    return kernel.count(r"STG\.(\w+\.)*128|UBLKCP|UTMASTG")


class Resources(NamedTuple):
    """A row of the table. Kernels of one name can be in several sources."""

    arch: str
    registers: int
    shared: int  # bytes, without what a launch adds
    loads: int  # wide ones
    stores: int
    name: str


def resources(found: Sequence[Kernel]) -> list[Resources]:
    """What the table holds of these kernels, architectures by number."""
    rows = [
        Resources(k.arch, k.registers, k.shared, wide_loads(k), wide_stores(k), k.name)
        for k in found
    ]
    return sorted(rows, key=lambda row: (len(row.arch), row.arch, row.name, row))


def read_table() -> tuple[str, list[Resources]]:
    """The compiler of the committed table, and its rows."""
    title, _, *lines = TABLE.read_text().splitlines()
    rows = []
    for line in lines:
        arch, *numbers, name = line.split(maxsplit=5)
        rows.append(Resources(arch, *map(int, numbers), name))
    return title.split()[-1], rows


def write_table(found: Sequence[Kernel]) -> None:
    """Replace the rows of these kernels' architectures; of another compiler all of them."""
    (compiler,) = {k.compiler for k in found}
    before, rows = read_table() if TABLE.exists() else ("", [])
    archs = {k.arch for k in found}
    kept = [row for row in rows if before == compiler and row.arch not in archs]
    rows = sorted([*kept, *resources(found)], key=lambda row: (len(row.arch), row.arch, row.name))
    lines = [f"# made by tests/machine_code.py from nvcc {compiler}"]
    for arch, *numbers, name in [Resources._fields, *rows]:
        lines.append(f"{arch:<6}" + "".join(f"{number:>10}" for number in numbers) + f"  {name}")
    TABLE.write_text("\n".join([*lines, ""]))


def differences(found: Sequence[Kernel], table: Sequence[Resources]) -> list[str]:
    """How kernels differ from the table; architectures that are not built are not compared."""
    archs = {k.arch for k in found}
    actual = Counter(resources(found))
    expected = Counter(row for row in table if row.arch in archs)
    return [
        *(f"built, not in the table: {row}" for row in actual - expected),
        *(f"in the table, not built: {row}" for row in expected - actual),
    ]


def main(argv: Sequence[str]) -> int:
    """Print, and write the table if asked to; the status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="tests/machine_code.py")
    parser.add_argument("--write", action="store_true", help="write machine_code.txt")
    parser.add_argument("binaries", nargs="*", type=Path, metavar="BINARY")
    args = parser.parse_args(argv)
    if not args.binaries:
        from mbkern import _C

        args.binaries = [Path(_C.__file__)]
    found = [k for binary in args.binaries for k in kernels(binary)]
    for k in sorted(found, key=lambda k: (k.arch, k.name)):
        print(
            f"{k.arch} {k.name}: {k.registers} registers, {k.shared} bytes shared,"
            f" {wide_loads(k)} wide loads, {wide_stores(k)} wide stores, {len(k.code)} instructions"
        )
    wrong = [line for k in found for line in problems(k)]
    print("\n".join(wrong) or f"{len(found)} kernels: nothing wrong")
    if args.write:
        write_table(found)
        print(f"{TABLE.name} written")
    compiler, table = read_table()
    if {k.compiler for k in found} == {compiler}:
        unlike = differences(found, table)
        wrong += unlike
        print("\n".join(unlike) or f"resources as in {TABLE.name}")
    else:
        print(f"resources NOT CHECKED: {TABLE.name} is of nvcc {compiler}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
