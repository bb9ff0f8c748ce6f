"""What is to be reached on an H100, against torch, peers and the device's own copy bandwidth.

The copy of a group moves as many bytes as the case must (each input read once, each output written
once), so a ratio of times is a share of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

from goals import Goal

from gpu import family, heads, ways
from gpu.graphs import GRAPH, LIMIT_US
from mbkern.bench.peers import LIGER_FP32
from mbkern.bench.results import Group

SUITE = "gpu"


def _where(loss: str, way: str, dtype: str = "") -> Callable[[Group], bool]:
    """Groups of a loss (and a dtype) in which a way was tried."""

    def tried(group: Group) -> bool:
        entry = group.entry(way)
        return entry is not None and bool(entry.samples or not entry.correct)

    return lambda g: g.case.startswith(loss) and g.dtype.startswith(dtype) and tried(g)


_CLASSES = "cross_entropy"
_ELEMENTS = "half_squared_error"


def _share(what: str, way: str, bound: float, loss: str = "", dtype: str = "") -> Goal:
    return Goal(f"share of copy bandwidth, {what}", SUITE, ways.COPY, way, bound,
                _where(loss, way, dtype))  # fmt: skip


def _against(peer: str, bound: float) -> Goal:
    return Goal(f"against {peer}", SUITE, peer, ways.IN_PLACE, bound, _where(_CLASSES, peer))


def _head(what: str, way: str, limit: str) -> Goal:
    return Goal(f"head, {what}", heads.SUITE, way, limit, 1.10, lambda g: True, at_least=False)


GOALS = (
    _share("fp32 in place", ways.IN_PLACE, 0.92, _CLASSES, "float32"),
    _share("bf16 in place", ways.IN_PLACE, 0.88, _CLASSES, "bfloat16"),
    _share("half squared error", ways.IN_PLACE, 0.93, _ELEMENTS),
    _share("into fp32 buffers", ways.ACCUMULATED, 0.93),
    _against(ways.EAGER, 2.5),
    _against(ways.COMPILED, 1.3),
    _against(ways.LIGER, 1.3),
    _against(ways.QUACK, 1.0),
    Goal("share of copy bandwidth, losses without exp", family.WITHOUT_EXP, ways.COPY,
         ways.IN_PLACE, 0.93, lambda g: True),
    Goal("share of copy bandwidth, losses with exp", family.WITH_EXP, ways.COPY, ways.IN_PLACE,
         0.88, lambda g: True),
    _head("imperative, to three products", heads.IMPERATIVE, heads.THREE),
    _head("into a buffer, to four products", heads.BUFFER, heads.FOUR),
    Goal("head against Liger, fp32 sums", heads.SUITE, LIGER_FP32, heads.IMPERATIVE, 1.0,
         lambda g: True),
    *(Goal(f"memory, {way}", heads.MEMORY, way, heads.LIMIT_MIB, 1.0, lambda g: True,
           at_least=False) for way in (heads.IMPERATIVE, heads.BUFFER)),
    Goal("(32, 1000) in a graph, us", GRAPH, ways.AUTOGRAD, LIMIT_US, 1.0, lambda g: True,
         at_least=False),
)  # fmt: skip
