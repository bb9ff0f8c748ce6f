"""Peak memory of a call above what was there before it.

On the CPU it is the kernel's high-water mark of resident memory (VmHWM) after the call, less what
was resident (VmRSS) before it. Before, free memory is given back to the system and the mark is
reset. The kernel counts pages in batches, so a difference below half a MiB means little. On a GPU
it is the peak of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PROCESS = Path("/proc/self")


def status(name: str) -> int:
    """A size in bytes from the kernel's account of this process; RuntimeError if it has none."""
    try:
        text = (_PROCESS / "status").read_text()
    except OSError:
        text = ""
    match = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    if not match:
        raise RuntimeError(f"no {name} in /proc/self/status")
    return int(match[1]) * 1024


def reset_mark() -> bool:
    """Let the high-water mark start again; False where the kernel does not allow it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Return free memory to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes above what was there before ``run``; None where it cannot be measured."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    give_back()
    if not reset_mark():
        return None
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)
