"""Interleaved timing: every round runs each way once, so that drift of the machine hits all alike.

Timed is ``Way.run`` alone: by the monotonic clock on the CPU, by events on a GPU, where the host's
own time is kept beside it. Not timed are ``Way.prepare`` (it restores what the last run overwrote
and drops its results, so returning the *results'* memory is not timed either; on a GPU it keeps the
device busy while the host issues the timed part) and the counting of page faults. Python's garbage
collector is off meanwhile.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mbkern.bench.results import Entry


def _nothing() -> None:
    pass


@dataclass
class Way:
    """One way to compute the thing.

    Attributes:
        name: what the tables call it.
        run: the timed part.
        prepare: called before each run, not timed.
        check: what ``run`` returned, to its largest error against fp64; None: not checked.
        calls: calls of the function in one run; times are divided by it.
        direction: "both", "forward" or "backward".
        isa: the instruction set that it is bound to, or nothing: mbkern's ways then run on the one
            in use.
        bytes: that one call must move at least.
        flops: floating-point operations of one call's matrix products.
        limit: whether it is a limit of the machine, and no way to compute the thing.
        in_place: whether it overwrites its input.
        extra: what else its record shall hold.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None] = _nothing
    check: Callable[[Any], float] | None = None
    calls: int = 1
    direction: str = "both"
    isa: str = ""
    bytes: int = 0
    flops: int = 0
    limit: bool = False
    in_place: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with the entries as they were measured up to then."""

    def __init__(self, entries: list[Entry]) -> None:
        super().__init__("interrupted")
        self.entries = entries


def page_faults() -> int:
    """Pages that the kernel has supplied to this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def once(way: Way, device: str = "cpu") -> tuple[float, float, int]:
    """Nanoseconds of one run, those that the host was busy, and the pages that it was given."""
    clock = time.perf_counter_ns
    way.prepare()
    pages = page_faults()
    if device == "cpu":
        start = clock()
        result = way.run()
        stop = clock()
        pages = page_faults() - pages
        del result
        return float(stop - start), float(stop - start), pages
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start = clock()
    begin.record()
    result = way.run()
    end.record()
    stop = clock()
    end.synchronize()
    del result
    return begin.elapsed_time(end) * 1e6, float(stop - start), page_faults() - pages


def replayed(way: Way) -> Way:
    """The same on a GPU, captured once as a graph and replayed: without the host's share."""
    import torch

    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = []

    def prepare() -> None:
        way.prepare()
        if kept:
            return
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            way.run()
        torch.cuda.current_stream().wait_stream(side)
        way.prepare()
        with torch.cuda.graph(graph):
            kept.append(way.run())
        way.prepare()

    def run() -> Any:
        graph.replay()
        return kept[0]

    return replace(way, name=f"{way.name}, graph replay", run=run, prepare=prepare)


def interleave(
    ways: Sequence[Way], effort: Effort, device: str = "cpu", *, unit: float = 1e-6
) -> list[Entry]:
    """Time all ways in turn, A B C A B C ...; samples are nanoseconds times ``unit``.

    A way that raises is left out from then on, and its entry says why.

    Raises:
        Interrupted: at Ctrl-C, with what was measured.
    """
    entries = [Entry(way.name) for way in ways]
    faults: list[list[int]] = [[] for _ in ways]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    recording = _Recording(ways, entries, faults, device, unit)
    try:
        recording.rounds(effort.warm_up, 1, effort.most, False)
        least = most = effort.repeats or 0
        if effort.repeats is None:
            least, most = effort.least, effort.most
        recording.rounds(effort.seconds, least, most, True)
    except KeyboardInterrupt:
        raise Interrupted(recording.finished()) from None
    finally:
        if collecting:
            gc.enable()
    return recording.finished()


@dataclass
class _Recording:
    ways: Sequence[Way]
    entries: list[Entry]
    faults: list[list[int]]
    device: str
    unit: float

    def rounds(self, seconds: float, least: int, most: int, record: bool) -> None:
        deadline = time.perf_counter_ns() + int(seconds * 1e9)
        done = 0
        while done < least or (time.perf_counter_ns() < deadline and done < most):
            for way, entry, pages in zip(self.ways, self.entries, self.faults, strict=True):
                if entry.failed:
                    continue
                try:
                    elapsed, host, faults = once(way, self.device)
                except Exception as failure:
                    entry.fail(failure)
                    continue
                if record:
                    entry.samples.append(elapsed * self.unit / way.calls)
                    if self.device != "cpu":
                        entry.host.append(host * self.unit / way.calls)
                    pages.append(faults)
            done += 1

    def finished(self) -> list[Entry]:
        for entry, pages in zip(self.entries, self.faults, strict=True):
            if pages:
                entry.faults = statistics.median(pages)
        return self.entries
