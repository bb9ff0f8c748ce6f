"""What the built module links, exports and expects of the process, read from its ELF files."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401 - its OpenMP runtime is the one that is copied below

from mbkern import _C
from mbkern._doctor import openmp_runtimes

MODULE = Path(_C.__file__)
ROOT = Path(__file__).parent.parent
OPENMP = {"GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"}

GLOBAL, WEAK, UNIQUE = 1, 2, 10  # symbol bindings
SYMTAB, DYNAMIC, DYNSYM = 2, 6, 11  # section types
NEEDED = 1  # tag of a dynamic entry


class Symbol(NamedTuple):
    name: str
    binding: int
    defined: bool


class Elf:
    """Symbols and needed libraries of a 64-bit little-endian ELF file."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01"
        (start,) = struct.unpack_from("<Q", self.data, 0x28)
        size, count = struct.unpack_from("<HH", self.data, 0x3A)
        # Each section: name, type, flags, address, offset, size, link, info, alignment, entry size.
        self.sections = [
            struct.unpack_from("<IIQQQQIIQQ", self.data, start + size * i) for i in range(count)
        ]

    def _entries(self, kind: int, layout: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The entries of all sections of a type, each with the offset of its string table."""
        for section in self.sections:
            if section[1] == kind:
                table = self.data[section[4] : section[4] + section[5]]
                strings = self.sections[section[6]][4]
                for entry in struct.iter_unpack(layout, table):
                    yield strings, entry

    def _string(self, start: int) -> str:
        return self.data[start : self.data.index(b"\0", start)].decode()

    def symbols(self, kind: int) -> list[Symbol]:
        return [
            Symbol(self._string(strings + name), info >> 4, section != 0)
            for strings, (name, info, _, section, _, _) in self._entries(kind, "<IBBHQQ")
        ]

    def needed(self) -> list[str]:
        entries = self._entries(DYNAMIC, "<qQ")
        return [self._string(strings + value) for strings, (tag, value) in entries if tag == NEEDED]


def test_links_only_the_system() -> None:
    needed = Elf(MODULE).needed()
    assert any(name.startswith("libc.so") for name in needed), needed
    foreign = re.compile(r"lib(torch|c10|cuda|gomp|omp|iomp|python)")
    assert not [name for name in needed if foreign.match(name)]


def test_needs_no_cuda_library() -> None:
    """The runtime is linked in, and looks for the driver when it is first used."""
    names = {s.name for s in Elf(MODULE).symbols(DYNSYM) if not s.defined}
    assert any(name.startswith("Py") for name in names)
    assert not [name for name in names if re.match(r"cu[A-Z]|cuda|__cuda|nv", name)]


def test_openmp_is_optional() -> None:
    found = {s for s in Elf(MODULE).symbols(DYNSYM) if s.name in OPENMP}
    assert found == {Symbol(name, WEAK, defined=False) for name in OPENMP}


def test_exports_one_symbol() -> None:
    exported = [s.name for s in Elf(MODULE).symbols(DYNSYM) if s.defined]
    assert exported == ["PyInit__C"]


def _isa_objects() -> list[Path]:
    tree = f"build/cp{sys.version_info.major}{sys.version_info.minor}-*"
    found = sorted(ROOT.glob(f"{tree}/CMakeFiles/mbkern_*.dir/csrc/cpu/*.o"))
    objects = [path for path in found if (ROOT / "csrc/cpu" / path.stem).exists()]
    if not objects:
        pytest.skip(f"NOT CHECKED: no objects in {ROOT / tree}; `make test` leaves them there")
    return objects


def test_isa_objects_share_nothing() -> None:
    """An inline function shared by the linker could be the AVX-512 copy, run on any machine."""
    objects = _isa_objects()
    isas = {path.parts[path.parts.index("CMakeFiles") + 1] for path in objects}
    assert isas >= {f"mbkern_{isa}.dir" for isa in _C.isas()}
    in_std = re.compile(r"_Z[A-Z]*(N[A-Z]*)?St|_Z(N[A-Z]*)?S[absiod]")
    for path in objects:
        symbols = Elf(path).symbols(SYMTAB)
        assert any(s.binding == GLOBAL and s.defined for s in symbols), path
        assert not [s.name for s in symbols if s.binding in (WEAK, UNIQUE)], path
        assert not [s.name for s in symbols if in_std.match(s.name)], path


HAS_OPENMP = """
import ctypes, importlib.util, pathlib, re, sys
module, *runtimes = sys.argv[1:]
for runtime in runtimes:
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("_C", module)
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
assert "torch" not in sys.modules
loaded = re.search(r"/lib(gomp|omp|iomp5)[^/]*$", pathlib.Path("/proc/self/maps").read_text(), re.M)
assert bool(loaded) == bool(runtimes)
print(_C.has_openmp())
"""


def _has_openmp(*runtimes: Path) -> str:
    command = [sys.executable, "-I", "-c", HAS_OPENMP, MODULE, *runtimes]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_openmp_is_found_under_any_file_name(tmp_path: Path) -> None:
    runtime, *_ = openmp_runtimes(Path("/proc/self/maps").read_text())
    renamed = tmp_path / "libgomp-0123abcd.so.1"
    shutil.copy(runtime, renamed)
    assert _has_openmp(renamed) == "True"


def test_openmp_may_be_absent() -> None:
    assert _has_openmp() == "False"


def test_types_are_installed() -> None:
    """Without them the stub check of `make lint` would silently check nothing."""
    assert MODULE.with_name("_C.pyi").is_file()
    assert MODULE.with_name("py.typed").is_file()
