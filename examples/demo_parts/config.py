"""Sizes of the demonstration, and what is known about the machine it runs on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import mbkern

# The optimisation batch of 50 sequences, cut in four ways ("10x5": ten micro-batches of five).
CUTS: dict[str, tuple[int, ...]] = {
    "1x50": (50,),
    "10x5": (5,) * 10,
    "50x1": (1,) * 50,
    "ragged": (1, 2, 3, 7, 16, 21),
}


@dataclass(frozen=True)
class Config:
    """Sizes of data, model and measurement; the seed of everything random."""

    seed: int = 0
    threads: int | None = None  # None: as many as torch takes
    corpus_bytes: int = 4_000_000
    vocabulary: int = 16_384
    width: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 64
    batch: int = 50
    training_cut: str = "10x5"
    steps: int = 20
    warmup_steps: int = 2
    learning_rate: float = 2e-3
    memory_cuts: tuple[str, ...] = ("1x50", "10x5")
    micro_batches: tuple[int, ...] = (1, 2, 4, 5, 8, 10, 16, 32, 50, 64)
    rounds: int = 5
    knee: float = 0.9
    digit_epochs: int = 8


QUICK = Config(
    threads=1,  # tests may share the machine, where waiting for a second thread takes longest
    corpus_bytes=300_000,
    vocabulary=2_048,
    width=32,
    context=32,
    steps=5,
    memory_cuts=("1x50",),
    micro_batches=(1, 5, 10, 50),
    rounds=3,
    digit_epochs=2,
)


def environment() -> dict[str, str | int]:
    """Versions, processor and threads: what the numbers depend on."""
    packages = ("torch", "numpy", "scikit-learn", "tokenizers", "matplotlib", "rich")
    return {
        "mbkern": mbkern.__version__,
        "mbkern_numerics": mbkern.NUMERICS_VERSION,
        "mbkern_isa": mbkern._C.isa(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Processor", "CPU part")):
            return line.split(":", 1)[1].strip()
    return platform.machine()
