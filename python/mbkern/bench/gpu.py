"""A GPU's driver, clocks, power and temperature, as NVML tells them. Nothing is changed."""

from __future__ import annotations

import os
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
    "throttled": "clocks_event_reasons.active",
}


def parse_query(line: str) -> dict[str, str]:
    """A line of ``nvidia-smi --query-gpu``, in the order of QUERY."""
    values = [value.strip() for value in line.split(",")]
    return dict(zip(QUERY, values, strict=True))


def sensors() -> dict[str, str]:
    """Driver, clocks, power and temperature now; empty where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}"]
    command += ["--format=csv,noheader,nounits"]
    return next(filter(None, (_ask([*command, f"--id={name}"]) for name in _names())), {})


def _ask(command: list[str]) -> dict[str, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return parse_query(done.stdout.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def _names() -> list[str]:
    """What nvidia-smi may call the current GPU. It counts all there are, torch what it is shown."""
    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    names = [] if uuid is None else [f"GPU-{str(uuid).removeprefix('GPU-')}"]
    return names if "CUDA_VISIBLE_DEVICES" in os.environ and names else [*names, str(index)]


# Bits of "throttled" that slow kernels down: power cap, slowdowns by heat and power brake.
# Idle (1), applied clocks (2) and sync boost (16) do not.
_SLOW = {4: "power cap", 8: "hardware slowdown", 32: "heat (software)", 64: "heat (hardware)",
         128: "power brake"}  # fmt: skip


def throttling(facts: dict[str, str]) -> list[str]:
    """Why the GPU runs slower than its clocks allow, in words; empty if it does not."""
    try:
        bits = int(facts.get("throttled", "0"), 16)
    except ValueError:  # "[N/A]"
        return []
    return [what for bit, what in _SLOW.items() if bits & bit]


def describe() -> dict[str, Any]:
    """The current GPU; empty without one."""
    if not torch.cuda.is_available():
        return {}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": gpu.name,
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "L2 MiB": gpu.L2_cache_size / 2**20,
        "memory GiB of the GPU": round(gpu.total_memory / 2**30, 1),
        **sensors(),
    }
