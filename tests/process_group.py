"""Tests over several processes: how their ranks are started, meet, and end."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "loops"))

from processes import leave  # noqa: F401


def start(
    script: str, world: int, folder: Path, *arguments: str, seconds: float = 150
) -> list[subprocess.CompletedProcess[str]]:
    """``SCRIPT RANK WORLD FOLDER ARGUMENTS`` for every rank at once, and how each ended."""
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder), *arguments],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        errors = [rank.communicate(timeout=seconds)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [
        subprocess.CompletedProcess(rank.args, rank.returncode, "", error)
        for rank, error in zip(ranks, errors, strict=True)
    ]


def run(script: str, world: int, folder: Path, *arguments: str, seconds: float = 150) -> None:
    """The same, where every rank is to end well."""
    done = start(script, world, folder, *arguments, seconds=seconds)
    assert [rank.returncode for rank in done] == [0] * world, [rank.stderr for rank in done]


def join(seconds: float = 60) -> tuple[int, int, Path, list[str]]:
    """Meet the other ranks over gloo, one thread each: rank, world, folder and the arguments.

    A collective waits for ``seconds``.
    """
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    patience = timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=patience
    )
    return rank, world, folder, sys.argv[4:]
