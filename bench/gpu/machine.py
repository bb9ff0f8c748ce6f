"""The GPU and the software that results hold for."""

from __future__ import annotations

import re
from typing import Any

import torch


def missing() -> str:
    """Why nothing can be checked here, or an empty string."""
    if torch.cuda.is_available():
        return ""
    return "no GPU" if torch.version.cuda else "no GPU (and this torch is built without CUDA)"


def fingerprint() -> dict[str, Any]:
    """The GPU by name, its driver and clocks, and versions."""
    from mbkern.bench import gpu  # imports mbkern, which the stage build may install
    from mbkern.bench.machine import describe

    host = describe()
    facts: dict[str, Any] = {
        key: host[key]
        for key in ("date", "cpu", "cpus", "kernel", "python", "torch", "mbkern",
                    "mbkern built from", "numerics", "commit")
    }  # fmt: skip
    facts["torch CUDA"] = torch.version.cuda
    facts |= gpu.describe()
    return facts


def file_name(gpu: str, date: str) -> str:
    """A results file's name: "NVIDIA H100 80GB HBM3" on a day is nvidia-h100-80gb-hbm3-<day>."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + f"-{date[:10]}.json"
