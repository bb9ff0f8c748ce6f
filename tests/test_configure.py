"""What CMake refuses to configure, naming what was found and is needed. Compiles nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("CXXFLAGS", "CUDAFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAARCHS")


def configure(folder: Path, *options: str, **variables: str) -> tuple[int, str]:
    """Exit status, and the output without its line breaks."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("NOT CHECKED: no cmake on the path")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    environment = {k: v for k, v in os.environ.items() if k not in FLAGS} | variables
    done = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(folder), *generator, "-DMBKERN_PYTHON=OFF", *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


MISSING = "/nowhere/nvcc"
REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "bad MBKERN_CUDA": (
        ["-DMBKERN_CUDA=MAYBE"], {}, "mbkern: found MBKERN_CUDA=MAYBE; needed is AUTO, ON or OFF",
    ),
    "no nvcc": (
        ["-DMBKERN_CUDA=ON"], {"CUDACXX": MISSING},
        "mbkern: MBKERN_CUDA=ON, but CUDA: no (needed: a CUDA toolkit, its nvcc in CUDACXX",
    ),
    "shim and CUDA": (
        ["-DMBKERN_CUDA=ON", "-DMBKERN_CUDA_SHIM=ON"], {},
        "mbkern: MBKERN_CUDA_SHIM needs MBKERN_CUDA=OFF; found is ON",
    ),
    "no objects": (
        ["-DMBKERN_CPU_OBJECTS=/nowhere/build"], {},
        "mbkern: found no CPU tiers in MBKERN_CPU_OBJECTS=/nowhere/build; needed is the folder of",
    ),
    "fast-math": (
        [], {"CXXFLAGS": "-O2 -ffast-math"},
        "mbkern: found -ffast-math in the compiler flags; remove it",
    ),
    "fast-math of nvcc": (
        [], {"CUDAFLAGS": "-use_fast_math"},
        "mbkern: found -use_fast_math in the compiler flags; remove it",
    ),
    "fast-math of a configuration": (
        ["-DCMAKE_CXX_FLAGS_RELEASE=-O3 -ffast-math"], {},
        "mbkern: found -ffast-math in the compiler flags; remove it",
    ),
    "fast-math that nvcc adds by itself": (
        [], {"NVCC_APPEND_FLAGS": "-use_fast_math"},
        "mbkern: found -use_fast_math in the compiler flags; remove it",
    ),
    "a part of fast-math": (
        [], {"CXXFLAGS": "-ffinite-math-only"},
        "mbkern: found -ffinite-math-only in the compiler flags; remove it",
    ),
    "processor": (
        ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=riscv64"], {},
        "mbkern: found Linux riscv64, ",
    ),
    "system": (
        ["-DCMAKE_SYSTEM_NAME=FreeBSD", "-DCMAKE_SYSTEM_PROCESSOR=x86_64"], {},
        "mbkern: found FreeBSD x86_64, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "variables", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    tmp_path: Path, options: list[str], variables: dict[str, str], message: str
) -> None:
    status, output = configure(tmp_path, "-DMBKERN_CUDA=OFF", *options, **variables)
    assert status != 0
    assert message in output, output


def test_configures(tmp_path: Path) -> None:
    """Where nothing is wrong, without which the refusals would show little."""
    status, output = configure(tmp_path, "-DMBKERN_CUDA=OFF", CXXFLAGS="-O2")
    assert status == 0, output
    assert "CUDA: no (MBKERN_CUDA=OFF)" in output


def test_no_nvcc_is_said_at_the_end(tmp_path: Path) -> None:
    """MBKERN_CUDA=AUTO builds without, and the last line says what is missing."""
    status, output = configure(tmp_path, "-DMBKERN_CUDA=AUTO", CUDACXX=MISSING)
    assert status == 0, output
    assert "CUDA: no (needed: a CUDA toolkit, its nvcc in CUDACXX" in output
