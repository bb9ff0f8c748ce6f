"""The two states of the C library's allocator that a suite runs in, each in its own process.

default:
    glibc as it comes. Blocks above 32 MiB are mapped afresh for every tensor, so each page of a
    result is supplied (and cleared) by the kernel at its first touch; smaller ones sometimes are,
    because the threshold adapts.
recycled:
    glibc tuned through its environment never to map blocks nor to return memory, with a reserve
    that was touched and freed once; large blocks are then reused, as under a caching allocator or
    in the steady state of a training loop that keeps its buffers.

The faults column of the tables shows whether it worked: recycled memory has none.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

DEFAULT, RECYCLED = "default", "recycled"

_TUNABLES = {"mmap_max": 0, "trim_threshold": 1 << 40, "top_pad": 64 << 20}
_RESERVE = 3 << 30


def environment(state: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process in that state: the caller's, without its own allocator settings.

    Raises RuntimeError where the state cannot be had, ValueError where there is none of that name.
    """
    if state not in (DEFAULT, RECYCLED):
        raise ValueError(f"unknown state {state!r}; there are {DEFAULT}, {RECYCLED}")
    ours = {k: v for k, v in base.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    if state == DEFAULT:
        return ours
    if platform.libc_ver()[0] != "glibc":
        raise RuntimeError("recycled memory needs glibc's allocator")
    settings = (f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())
    return {**ours, "GLIBC_TUNABLES": ":".join(settings)}


def fill_reserve(state: str, limit: int = _RESERVE) -> int:
    """Touch and free the reserve of recycled memory; returns its bytes. Call before all else.

    At most a quarter of what is available is taken.
    """
    if state != RECYCLED:
        return 0
    import torch

    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(limit, pages // 4) // 4096 * 4096
    block = torch.empty(size, dtype=torch.uint8)
    block[::4096] = 1
    return size
