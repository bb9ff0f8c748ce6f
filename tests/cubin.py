"""The kernels in a binary, disassembled by NVIDIA's cuobjdump and nvdisasm. No GPU is needed."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple


class NoDisassembler(Exception):
    """The machine code cannot be read here; says what is missing."""


class Instruction(NamedTuple):
    """One line of machine code.

    ``routine`` names the subroutine of the compiler's own that it belongs to, such as the slow path
    of a division; it is empty in the kernel itself.
    """

    address: int
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str
    routine: str = ""
    guarded: bool = False  # by a predicate


@dataclass
class Kernel:
    """A kernel for one architecture, and what its launch takes."""

    arch: str  # "sm_90"
    name: str
    registers: int
    stack: int  # bytes, as of local and shared memory
    local: int
    shared: int
    compiler: str  # version of ptxas
    flags: str  # with which ptxas ran
    code: list[Instruction] = field(default_factory=list, repr=False)
    labels: dict[str, int] = field(default_factory=dict, repr=False)  # the address of each

    def count(self, opcode: str) -> int:
        """How many instructions, the compiler's subroutines included, match the expression."""
        return sum(n for found, n in self._opcodes.items() if re.match(opcode, found))

    @functools.cached_property
    def _opcodes(self) -> Counter[str]:
        """How often each is there: some hundreds, of the millions that a binary has."""
        return Counter(i.opcode for i in self.code)


def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm: from its wheel, else from PATH."""
    try:
        listed = files(f"nvidia-cuda-{name}") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.name == name:
            return str(file.locate())
    found = shutil.which(name)
    if found is None:
        raise NoDisassembler(f"no {name}: pip install nvidia-cuda-{name}")
    return found


def kernels(binary: Path) -> list[Kernel]:
    """All kernels in a module, an object or a cubin; PTX holds none."""
    with tempfile.TemporaryDirectory() as folder:
        if binary.suffix == ".cubin":
            return list(_kernels(binary))
        _run(tool("cuobjdump"), "-xelf", "all", str(binary.resolve()), cwd=folder)
        return [k for cubin in sorted(Path(folder).iterdir()) for k in _kernels(cubin)]


def ptx_architectures(binary: Path) -> set[str]:
    """The architectures that the binary has PTX of, as in "sm_80"."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", _run(tool("cuobjdump"), "-lptx", str(binary))))


def _run(*command: str, cwd: str | None = None, stdin: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


# "ptxas", its version, its branch and its command line: strings in a note of the cubin.
_NOTE = re.compile(rb"release [\d.]+, V([\d.]+)\0[^\0]*\0-arch (sm_\w+)([^\0]*)\0")
_RESOURCES = re.compile(
    r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)
_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"([.$\w]+):$")
_INSTRUCTION = re.compile(
    r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*(?:\(\*|;)"
)


def _kernels(cubin: Path) -> Iterator[Kernel]:
    note = _NOTE.search(cubin.read_bytes())
    if note is None:
        raise NoDisassembler(f"{cubin.name} has no note of the compiler that made it")
    compiler, arch, flags = (part.decode().strip() for part in note.groups())
    found = _RESOURCES.findall(_run(tool("cuobjdump"), "-res-usage", str(cubin)))
    names = _demangle([symbol for symbol, *_ in found])
    by_symbol: dict[str, Kernel] = {}
    for (symbol, *numbers), name in zip(found, names, strict=True):
        registers, stack, shared, local = map(int, numbers)
        by_symbol[symbol] = Kernel(arch, name, registers, stack, local, shared, compiler, flags)
    kernel: Kernel | None = None
    routine = ""
    pending: list[str] = []  # labels whose address is that of the next instruction
    # Its analysis of the flow of data takes a quarter of its time; what is read is the same.
    for line in _run(tool("nvdisasm"), "-c", "-ndf", str(cubin)).splitlines():
        if kernel and (instruction := _INSTRUCTION.match(line)):  # nearly all lines are
            address = int(instruction[1], 16)
            if pending:
                kernel.labels.update(dict.fromkeys(pending, address))
                pending = []
            kernel.code.append(
                Instruction(address, *instruction.group(3, 4), routine, instruction[2] is not None)
            )
        elif section := _SECTION.match(line):
            kernel, routine, pending = by_symbol[section[1]], "", []
        elif label := _LABEL.match(line):
            pending.append(label[1])
            if label[1].startswith("$"):
                routine = label[1]
    yield from by_symbol.values()


def _demangle(symbols: list[str]) -> list[str]:
    """Without parameters and without the namespaces that all kernels are in."""
    text = _run("c++filt", "-p", stdin="\n".join(symbols)) if symbols else ""
    unwanted = r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\bmbk::cuda::"
    return [re.sub(unwanted, "", name) for name in text.splitlines()]
