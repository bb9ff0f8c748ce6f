"""The memory of a process at its peak, and how much it may have.

On the CPU this is resident memory as the kernel counts it, and as it ends processes by: VmHWM in
/proc/self/status, whose mark is reset before each measurement and free memory given back. It has in
it what torch's own account has not: the scratch memory of libraries (a convolution's reordered
operands: as much again as its activations) and what the C library's heap loses between blocks.
The latter depends on the past: from process to process a pass of 100 MB differs by up to a third
(of the whole process: a tenth). Where the kernel does not let the mark be reset, torch's profiler
lists what torch allocates, and only that.

On CUDA it is the peak of torch's allocator, ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mbkern.bench import memory

KEPT_FREE = 0.1  # of what is available, where no limit is given


def settle_heap() -> None:
    """Bring glibc's heap to where a training loop ends up.

    It maps blocks above a threshold afresh at each allocation, page by page, and lowers its top as
    soon as twice that is free, until a block of up to 32 MiB was freed: then that is the threshold.
    Small micro-batches would seem slow, and large ones after them fast, for that reason alone.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")


def held(device: torch.device) -> int:
    """Bytes of the process (CPU) or of torch's allocator (CUDA) now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    memory.give_back()
    return memory.status("VmRSS")


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """The most of the same while ``run`` runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    before = held(device)
    if not memory.reset_mark():
        return before + allocated_by_torch(run)
    run()
    return memory.status("VmHWM")


def allocated_by_torch(run: Callable[[], Any]) -> int:
    """The most bytes that torch has allocated at once in ``run``, on the CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def default_limit(device: torch.device, sharing: int) -> int:
    """What the process may hold: what it has, and nine tenths of what is free.

    Args:
        device: where.
        sharing: how many such processes this machine's memory is for.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = min(_available(), _left_in_group()) // sharing
    return held(device) + int(free * (1 - KEPT_FREE))


def _available() -> int:
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    if not match:
        raise RuntimeError("mbkern: no MemAvailable in /proc/meminfo; give plan a memory_limit")
    return int(match[1]) * 1024


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group (a container, a job) has left; more than any memory without one."""
    left = 1 << 62
    try:
        path = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":")[-1].strip("/")
    except (OSError, IndexError):
        return left
    return min(left, *(_left_in(folder, left) for folder in (root, root / path)))


def _left_in(folder: Path, unlimited: int) -> int:
    try:
        most = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return unlimited
    return unlimited if most == "max" else max(0, int(most) - used)
