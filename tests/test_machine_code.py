"""The machine code of the CUDA kernels: what is in it, and that the checks see planted faults."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import contraction
import machine_code
import pytest
from cubin import Kernel, NoDisassembler, kernels
from machine_code import differences, problems, read_table, wide_loads, wide_stores, write_table

from mbkern import _C

PROBES = contraction.ROOT / "tests/native/probes.cu"


def _not_checked(reason: str) -> None:
    pytest.skip(f"NOT CHECKED: {reason}")


@pytest.fixture(scope="module")
def built() -> list[Kernel]:
    """The kernels of the installed module."""
    archs = _C.build_info()["cuda_archs"]
    if not archs:
        _not_checked("this build has no CUDA: no nvcc was found, or MBKERN_CUDA=OFF")
    try:
        found = kernels(Path(_C.__file__))
    except NoDisassembler as error:
        _not_checked(str(error))
    expected = {f"sm_{a.split('-')[0]}" for a in archs.split() if not a.endswith("-virtual")}
    assert {k.arch for k in found} == expected
    return found


@pytest.fixture(scope="module")
def build() -> Path:
    """The folder that the installed module was built in."""
    folder = contraction.newest_build()
    if folder is None or not contraction.build_commands(folder):
        _not_checked("no build of CUDA sources under build/; `make test` leaves it there")
    return folder


def test_kernels_are_faultless(built: list[Kernel]) -> None:
    assert not [line for k in built for line in problems(k)]
    for name in machine_code.WIDE:
        assert any(re.search(name, k.name) for k in built), name


def test_resources_are_those_of_the_table(built: list[Kernel]) -> None:
    """A register more can cost a block an SM: `python tests/machine_code.py --write` if wanted."""
    compiler, table = read_table()
    others = {k.compiler for k in built} - {compiler}
    if others:
        _not_checked(f"the table is of nvcc {compiler}, this build of {', '.join(others)}")
    assert not differences(built, table)


def _sources() -> list[Any]:
    """The CUDA sources; slow those that are the same as others but for the type in memory."""
    names = sorted(path.name for path in (contraction.ROOT / "csrc/cuda").glob("*.cu"))
    twin = re.compile(r"_(bf16|f16|f64)[.]cu$")
    return [pytest.param(n, marks=pytest.mark.slow) if twin.search(n) else n for n in names]


@pytest.mark.parametrize("source", _sources())
def test_nothing_was_contracted(source: str, build: Path, tmp_path: Path) -> None:
    commands = {path.name: (path, c) for path, c in contraction.build_commands(build).items()}
    assert len(commands) == len(_sources())
    path, command = commands[source]
    ptx = contraction.compile_ptx(command, path, tmp_path)
    assert not contraction.ptx_problems(ptx)
    if not re.match(r"device|product|row_call|row_plan|rows_f64", source):  # no fp32 functions
        assert ptx.count(contraction.MARK) > 100


# ---- The checks themselves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler for the probes: the build's, else from PATH."""
    folder = contraction.newest_build()
    commands = contraction.build_commands(folder) if folder else {}
    found = next(iter(commands.values()))[0] if commands else shutil.which("nvcc")
    if found is None:
        _not_checked("no nvcc to compile probes with")
    return found


def _probes(nvcc: str, folder: Path, *flags: str) -> dict[str, Kernel]:
    cubin = folder / "probes.cubin"
    subprocess.run(
        [nvcc, "-cubin", "-arch=sm_90", *flags, str(PROBES), "-o", str(cubin)], check=True
    )
    try:
        return {k.name: k for k in kernels(cubin)}
    except NoDisassembler as error:
        _not_checked(str(error))
        raise


@pytest.fixture(scope="module")
def probes(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    return _probes(nvcc, tmp_path_factory.mktemp("probes"), "--fmad=false")


def test_good_probes_pass(probes: dict[str, Kernel]) -> None:
    good = [k for name, k in probes.items() if name.startswith("good")]
    assert len(good) == 6
    assert not [line for k in good for line in problems(k)]


@pytest.mark.parametrize(
    ("probe", "what"),
    [
        ("bad_exponential", "approximate function: 1, first MUFU.EX2"),
        ("bad_logarithm", "approximate function: 1, first MUFU.LG2"),
        ("bad_half", "arithmetic in half precision: 1,"),
        ("bad_half_fma", "arithmetic in half precision: 1,"),
        ("bad_atomic", "atomic on floating numbers: 1,"),
        ("bad_index", "local memory: 128 bytes of stack"),
        ("bad_index", "first STL"),
        ("bad_spill", "bytes of stack"),
    ],
)
def test_planted_faults_are_seen(probes: dict[str, Kernel], probe: str, what: str) -> None:
    assert any(what in line for line in problems(probes[probe])), problems(probes[probe])


def test_wide_accesses_are_told_from_narrow_ones(probes: dict[str, Kernel]) -> None:
    wide, narrow = probes["good_wide"], probes["bad_narrow"]
    assert (wide_loads(wide), wide_stores(wide)) == (1, 1)
    assert (wide_loads(narrow), wide_stores(narrow)) == (0, 0)
    assert not any("16 bytes" in line for line in problems(narrow))
    narrow = replace(narrow, name="pointwise<SquaredError, float>")
    assert any("no loads, or no stores, of 16 bytes" in line for line in problems(narrow))


def test_faulty_flags_are_seen(nvcc: str, tmp_path: Path) -> None:
    plain = _probes(nvcc, tmp_path)
    for kernel in plain.values():
        assert any("contraction: compiled with" in line for line in problems(kernel))
    fast = _probes(nvcc, tmp_path, "--use_fast_math", "--fmad=false")["good_float"]
    assert any("flush to zero" in line for line in problems(fast))


def test_faults_in_ptx_are_seen(nvcc: str, tmp_path: Path) -> None:
    def found(*flags: str) -> list[str]:
        return contraction.ptx_problems(contraction.compile_ptx([nvcc, *flags], PROBES, tmp_path))

    off = found("--fmad=false")
    assert not [line for line in off if line.startswith("good")]
    for probe in ("bad_exponential", "bad_logarithm", "bad_division"):
        assert any(line.startswith(f"{probe}: approximated") for line in off)
    assert not [line for line in off if line.startswith("bad_contraction")]

    assert any(line.startswith("bad_contraction: fused") for line in found())
    assert any(line.startswith("good_float: may be fused") for line in found())
    fast = found("--use_fast_math", "--fmad=false")
    assert any(line.startswith("good_float: flushed") for line in fast)


def test_differences_from_the_table_are_seen(
    probes: dict[str, Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "TABLE", tmp_path / "table.txt")
    good = [k for name, k in probes.items() if name.startswith("good")]
    write_table(good)
    compiler, table = read_table()
    assert compiler == good[0].compiler
    assert not differences(good, table)
    assert len(differences(good[1:], table)) == 1
    assert len(differences(good, table[1:])) == 1
    changed = [table[0]._replace(registers=table[0].registers + 1), *table[1:]]
    assert len(differences(good, changed)) == 2
    assert len(differences(good, [*table, table[0]])) == 1
    write_table([probes["bad_narrow"]])  # of the same architecture: replaces all
    assert [row.name for row in read_table()[1]] == ["bad_narrow"]
