"""Tests over several processes: how their ranks are started, meet, and end."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "loops"))

from processes import leave  # noqa: F401

# Ranks are forked from a process that has imported torch, which takes a rank longer than most of
# what it is started for, and nothing else: mbkern and OpenMP begin in each rank.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.fsdp", "torch.testing", "pytest"])


def _run_script(environment: dict[str, str], errors: str, words: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def start(
    script: str, world: int, folder: Path, *arguments: str, seconds: float = 150
) -> list[subprocess.CompletedProcess[str]]:
    """``SCRIPT RANK WORLD FOLDER ARGUMENTS`` for every rank at once, and how each ended."""
    words = [[script, str(rank), str(world), str(folder), *arguments] for rank in range(world)]
    errors = [folder / f"errors.{rank}" for rank in range(world)]
    for file in errors:
        file.touch()  # a rank that dies at once says nothing
    ranks = [
        _context.Process(target=_run_script, args=(dict(os.environ), str(file), line))
        for file, line in zip(errors, words, strict=True)
    ]
    end = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
        late = [k for k, rank in enumerate(ranks) if rank.is_alive()]
        if late:
            said = [errors[k].read_text() for k in late]
            raise TimeoutError(f"ranks {late} of {script} take more than {seconds} s: {said}")
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
    return [
        subprocess.CompletedProcess(line, rank.exitcode or 0, "", file.read_text())
        for rank, line, file in zip(ranks, words, errors, strict=True)
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
