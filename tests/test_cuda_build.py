"""Which GPUs a build is for, as CMake decides and as the doctor reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mbkern._doctor import runs_on

CHOICE = Path(__file__).parent.parent / "cmake/cuda_architectures.cmake"
SCRIPT = f"""
include("{CHOICE}")
mbkern_cuda_architectures(chosen)
message("chosen=${{chosen}}")
message("left in the environment=$ENV{{CUDAARCHS}}")
"""


def _chosen(folder: Path, nvidia_smi: str, *flags: str, archs: str | None = None) -> list[str]:
    """What the function of CMake chooses where ``nvidia-smi`` prints this text."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("NOT CHECKED: no cmake on the path")
    script, fake = folder / "script.cmake", folder / "nvidia-smi"
    script.write_text(SCRIPT)
    (folder / "output").write_text(nvidia_smi)
    fake.write_text(f'#!/bin/sh\ncat "{folder}/output"\n')
    fake.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "CUDAARCHS"}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    if archs is not None:
        environment["CUDAARCHS"] = archs
    done = subprocess.run(
        [cmake, *flags, "-P", str(script)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "left in the environment=\n" in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("chosen="))
    return [*line.removeprefix("chosen=").split(";"), *(["warned"] * ("Warning" in done.stderr))]


@pytest.mark.parametrize(
    ("nvidia_smi", "expected"),
    [
        ("9.0\n", ["90-real"]),
        ("8.6\n9.0\n8.6\n12.0\n", ["86-real", "90-real", "120-real"]),
        ("7.5\n8.9\n", ["89-real", "warned"]),
        ("7.5\n", ["80-virtual", "90-real", "warned"]),
        ("", ["80-virtual", "90-real"]),
        ("NVIDIA-SMI has failed: driver 580.9\n", ["80-virtual", "90-real"]),
        ("No devices were found\n", ["80-virtual", "90-real"]),
    ],
)
def test_builds_for_the_gpus_that_are_there(
    tmp_path: Path, nvidia_smi: str, expected: list[str]
) -> None:
    assert _chosen(tmp_path, nvidia_smi) == expected


def test_a_choice_of_the_user_comes_first(tmp_path: Path) -> None:
    assert _chosen(tmp_path, "9.0\n", archs="80;90-real") == ["80", "90-real"]
    flag = "-DCMAKE_CUDA_ARCHITECTURES=86"
    assert _chosen(tmp_path, "9.0\n", flag) == ["86"]
    assert _chosen(tmp_path, "9.0\n", flag, archs="80") == ["86"]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("90-real", (9, 0), True),
        ("90-real", (10, 0), False),  # machine code is of one major version
        ("80-real", (8, 6), True),
        ("86-real", (8, 0), False),
        ("80-virtual 90-real", (8, 9), True),
        ("80-virtual 90-real", (12, 1), True),
        ("90", (10, 3), True),  # machine code and PTX
        ("100-real 120-real", (9, 0), False),
    ],
)
def test_the_doctor_knows_what_runs(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(archs, capability) == runs
