"""Device time of a small loss: many forwards and backwards in one CUDA graph, replayed.

A replay costs the host some microseconds, as much as the loss itself; over CALLS of them in a graph
that is no longer seen, while the gaps between kernels, which a user has too, are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu import ways
from gpu.problem import Case, Problem
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Effort, Way, interleave

GRAPH = "gpu, graph replay"
LIMIT_US = "6 us"  # an entry that is the bound, so that the goal is a ratio of at most 1
CALLS = 50
CASE = Case("cross_entropy", 32, 1000, torch.float32)


def _capture(run: ways.Run, p: Problem) -> torch.cuda.CUDAGraph:
    """A graph of CALLS runs, after the warm-up that captures need, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            p.input.grad = None
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            p.input.grad = None
            run()
    return graph


def measure(effort: Effort) -> Group:
    """Microseconds of a forward and backward, by torch and by mbkern."""
    p = Problem(CASE, "cuda")
    functions: dict[str, Callable[[Problem], ways.Run]] = {
        ways.EAGER: ways.eager, ways.AUTOGRAD: ways.autograd, ways.IN_PLACE: ways.in_place,
    }  # fmt: skip
    graphs, errors = [], []
    for name, make in functions.items():
        run = make(p)
        p.restore()
        errors.append(p.error(*run()))
        graphs.append(Way(name, _capture(run, p).replay))
    entries = interleave(graphs, effort, "cuda")
    for entry, error in zip(entries, errors, strict=True):
        entry.samples = [ms * 1e3 / CALLS for ms in entry.samples]
        entry.error, entry.correct = error, error <= p.tolerance
    entries.append(Entry(LIMIT_US, [6.0] * len(entries[0].samples)))
    return Group(GRAPH, str(CASE), 1, "graph", "us", ways.EAGER, entries, CASE.columns)
