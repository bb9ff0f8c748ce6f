"""Interleaved timing: every round runs each way once, so that drift of the machine hits all alike.

Timed is ``Way.run`` alone, by the monotonic clock. Not timed are ``Way.prepare`` (it restores what
the last run overwrote and drops its results, so returning the *results'* memory is not timed
either) and the counting of page faults. Python's garbage collector is off meanwhile.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.results import Entry


def _nothing() -> None:
    pass


@dataclass
class Way:
    """One way to compute the thing.

    Attributes:
        name: what the tables call it.
        run: the timed part.
        prepare: called before each run, not timed.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Effort:
    """How long to measure a group.

    Attributes:
        seconds: rounds go on until this has passed, preparation included ...
        warm_up: ... after this much of the same without recording.
        least: rounds at least, even if they take longer.
        most: rounds at most.
        repeats: rounds exactly, if given, whatever the time.
    """

    seconds: float
    warm_up: float
    least: int = 7
    most: int = 2000
    repeats: int | None = None


def page_faults() -> int:
    """Pages that the kernel has supplied to this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def interleave(ways: Sequence[Way], effort: Effort, *, unit: float = 1e-6) -> list[Entry]:
    """Time all ways in turn, A B C A B C ...; samples are nanoseconds times ``unit``."""
    samples: list[list[float]] = [[] for _ in ways]
    faults: list[list[int]] = [[] for _ in ways]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        _rounds(ways, effort.warm_up, 1, effort.most, None)
        least = most = effort.repeats or 0
        if effort.repeats is None:
            least, most = effort.least, effort.most
        _rounds(ways, effort.seconds, least, most, (samples, faults, unit))
    finally:
        if collecting:
            gc.enable()
    return [
        Entry(way.name, times, faults=statistics.median(pages))
        for way, times, pages in zip(ways, samples, faults, strict=True)
    ]


def _rounds(
    ways: Sequence[Way],
    seconds: float,
    least: int,
    most: int,
    record: tuple[list[list[float]], list[list[int]], float] | None,
) -> None:
    clock = time.perf_counter_ns
    deadline = clock() + int(seconds * 1e9)
    done = 0
    while done < least or (clock() < deadline and done < most):
        for k, way in enumerate(ways):
            way.prepare()
            pages = page_faults()
            start = clock()
            result = way.run()
            stop = clock()
            if record:
                record[0][k].append((stop - start) * record[2])
                record[1][k].append(page_faults() - pages)
            del result
        done += 1
