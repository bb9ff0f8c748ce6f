"""Instructions an element, counted in the machine code of unrolled loops.

    python tests/unrolled.py BINARY KERNEL     (KERNEL: a regular expression)

A kernel that holds elements in registers is unrolled over its steps (16 for rows: a block of 1024
columns is 16 groups of 64), so what it does for each element is there that many times: as blocks
with the same operations, or within one long block. Both are printed. Which of them lie on the hot
path, and which are alternatives of one another, is for the reader of the source.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from cubin import Instruction, Kernel, kernels

STEPS = 14  # the first and the last step are often merged with what surrounds them
LEAST = 5  # instructions; shorter blocks are branches around others
Operations = tuple[tuple[str, int], ...]  # each operation and its number, sorted


def blocks(kernel: Kernel) -> list[list[Instruction]]:
    """Instructions that are executed together: no jump leads into or out of their middle."""
    targets = set(kernel.labels.values())
    found: list[list[Instruction]] = [[]]
    for i in kernel.code:
        if i.routine:
            break
        if found[-1] and (i.address in targets or found[-1][-1].opcode.startswith(("BRA", "EXIT"))):
            found.append([])
        found[-1].append(i)
    return found


def families(kernel: Kernel) -> dict[Operations, list[int]]:
    """Blocks of the same operations, STEPS of them or more: their addresses."""
    members: dict[Operations, list[int]] = defaultdict(list)
    for block in blocks(kernel):
        if len(block) >= LEAST:
            operations = Counter(i.opcode.split(".")[0] for i in block)
            members[tuple(sorted(operations.items()))].append(block[0].address)
    return {key: where for key, where in members.items() if len(where) >= STEPS}


def _text(operations: Operations) -> str:
    return ", ".join(f"{number} {name}" for name, number in operations)


def main(binary: str, name: str) -> int:
    """Print the families and the long blocks of all kernels of that name."""
    for kernel in kernels(Path(binary)):
        if not re.search(name, kernel.name):
            continue
        print(f"{kernel.arch} {kernel.name}: {len(kernel.code)} instructions")
        found = families(kernel)
        for operations, where in found.items():
            size = sum(number for _, number in operations)
            print(f"  {len(where)} times {size}, first at {where[0]:#x}: {_text(operations)}")
        for block in blocks(kernel):
            if len(block) >= LEAST * STEPS and not any(
                block[0].address in w for w in found.values()
            ):
                common = Counter(i.opcode.split(".")[0] for i in block).most_common(9)
                where = f"{len(block)} at {block[0].address:#x}"
                print(f"  one block of {where}: {_text(tuple(common))}, ...")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
