"""The GPU and the software that results hold for."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import torch

QUERY = {
    "driver": "driver_version",
    "power limit W": "power.limit",
    "power W": "power.draw",
    "temperature C": "temperature.gpu",
    "clock SM MHz": "clocks.sm",
    "clock memory MHz": "clocks.mem",
    "clock SM max MHz": "clocks.max.sm",
    "clock memory max MHz": "clocks.max.mem",
    "ECC": "ecc.mode.current",
}


def missing() -> str:
    """Why nothing can be checked here, or an empty string."""
    if torch.cuda.is_available():
        return ""
    return "no GPU" if torch.version.cuda else "no GPU (and this torch is built without CUDA)"


def parse_query(line: str) -> dict[str, str]:
    """A line of ``nvidia-smi --query-gpu``, in the order of QUERY."""
    values = [value.strip() for value in line.split(",")]
    return dict(zip(QUERY, values, strict=True))


def sensors() -> dict[str, str]:
    """Driver, clocks, power and temperature now; empty where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}"]
    command += ["--format=csv,noheader,nounits", f"--id={torch.cuda.current_device()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return parse_query(done.stdout.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def fingerprint() -> dict[str, Any]:
    """The GPU by name, its driver and clocks, and versions."""
    from harness.machine import describe  # imports mbkern, which the stage build may install

    host = describe()
    facts: dict[str, Any] = {
        key: host[key]
        for key in ("date", "cpu", "cpus", "kernel", "python", "torch", "mbkern",
                    "mbkern built from", "numerics", "commit")
    }  # fmt: skip
    facts["torch CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": gpu.name,
            "compute capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "L2 MiB": gpu.L2_cache_size / 2**20,
            "memory GiB": round(gpu.total_memory / 2**30, 1),
            **sensors(),
        }
    return facts


def file_name(gpu: str, date: str) -> str:
    """A results file's name: "NVIDIA H100 80GB HBM3" on a day is nvidia-h100-80gb-hbm3-<day>."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + f"-{date[:10]}.json"
