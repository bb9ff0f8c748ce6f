"""Interleaved timing on a device: by events on a GPU, by the host's clock in a rehearsal.

As in harness.timing every round runs each way once, and ``Way.prepare``, which restores what the
last run overwrote, is not timed. It keeps the GPU busy while the host issues the timed part, so
that the time between the events is the device's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from harness.results import Entry
from harness.timing import Effort, Way


def once(way: Way, device: str) -> float:
    """Milliseconds of one run, waiting for its end."""
    way.prepare()
    result: Any
    if device == "cpu":
        start = time.perf_counter()
        result = way.run()
        elapsed = (time.perf_counter() - start) * 1e3
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = way.run()
        end.record()
        end.synchronize()
        elapsed = begin.elapsed_time(end)
    del result
    return elapsed


def interleave(ways: Sequence[Way], effort: Effort, device: str) -> list[Entry]:
    """Time all ways in turn, A B C A B C ...; samples are milliseconds."""
    samples: list[list[float]] = [[] for _ in ways]
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for warm_up in (True, False):
            done, end = 0, time.monotonic() + (effort.warm_up if warm_up else effort.seconds)
            least = 1 if warm_up else effort.least
            while done < least or (time.monotonic() < end and done < effort.most):
                for way, times in zip(ways, samples, strict=True):
                    elapsed = once(way, device)
                    if not warm_up:
                        times.append(elapsed)
                done += 1
    finally:
        if collecting:
            gc.enable()
    return [Entry(way.name, times) for way, times in zip(ways, samples, strict=True)]
