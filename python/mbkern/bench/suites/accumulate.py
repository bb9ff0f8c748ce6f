"""Gradients of a GPT-2 added into float32 buffers, and the end of a mini-batch: the flush.

Both need what this build may not have: then the suites are skipped and say so. The limit is a bare
pass over the buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mbkern
from mbkern import _C
from mbkern.bench.models import parameters
from mbkern.bench.problem import TOLERANCE, Case, Plan, Problem, dtype_of, worse
from mbkern.bench.timing import Way

ITEMS = 7.0
MAX_NORM = 1.0
CLIPPED = 1e-3  # tolerance: torch adds up to 10^8 squares in float32 for the norm that clips


def _needs(name: str) -> Any:
    """A function of mbkern; LookupError where this build has none."""
    function = getattr(mbkern, name, None)
    if function is None:
        raise LookupError(f"mbkern {mbkern.__version__} has no {name}")
    return function


def _shapes(plan: Plan) -> list[tuple[int, ...]]:
    return parameters(2, 256, 8192) if plan.short else parameters(12, 768, 50257)


def _gradients(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    random = torch.Generator().manual_seed(8)
    return [torch.randn(s, generator=random).to(device, dtype) for s in shapes]


def _on(isa: str, run: Callable[[], Any]) -> Any:
    """A call on another instruction set than the one in use."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        return run()
    finally:
        _C.set_isa(before)


def _tiers(ours: Way, plan: Plan) -> list[Way]:
    """mbkern's way, and the same on every other instruction set that there is."""
    others = [isa for isa in _C.isas() if isa != _C.isa()] if plan.device == "cpu" else []
    return [
        ours,
        *(replace(ours, name=f"{ours.name} ({isa})", run=partial(_on, isa, ours.run), isa=isa)
          for isa in others),
    ]  # fmt: skip


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(results, exact, strict=True):
        off = (a.double() - b).abs().max() / b.abs().max()
        worst = worse(worst, off.item())
    return worst


def _accumulate(dtype: torch.dtype, plan: Plan) -> Problem:
    add = _needs("accumulate_")
    grads = _gradients(_shapes(plan), dtype, plan.device)
    start = _gradients([tuple(g.shape) for g in grads], torch.float32, plan.device)
    buffers = [b.clone() for b in start]
    size = sum(b.numel() for b in buffers)
    moved = size * (8 + dtype.itemsize)

    def restore() -> None:
        for buffer, first in zip(buffers, start, strict=True):
            buffer.copy_(first)

    def check(_: Any) -> float:
        exact = [(a.double() + g.double()) for a, g in zip(start, grads, strict=True)]
        return _error(buffers, exact)

    def one_by_one() -> None:
        for buffer, grad in zip(buffers, grads, strict=True):
            buffer.add_(grad)

    def bare() -> None:
        for buffer in buffers:
            buffer.neg_()

    runs: dict[str, Callable[[], Any]] = {
        "torch": one_by_one,
        "torch foreach": lambda: torch._foreach_add_(buffers, grads),
    }
    ways = [Way(name, run, restore, check, bytes=moved) for name, run in runs.items()]
    ours = Way("mbkern", lambda: add(buffers, grads), restore, check, bytes=moved)
    ways += _tiers(ours, plan)
    ways.append(Way("limit: bare pass", bare, restore, bytes=8 * size, limit=True))
    return Problem(ways, TOLERANCE[torch.float32])


def accumulate(plan: Plan) -> list[Case]:
    """Gradients in float32 and bfloat16."""
    _needs("accumulate_")
    shapes = _shapes(plan)
    size = sum(torch.Size(s).numel() for s in shapes)
    return [
        Case("accumulate", f"gpt-2, {len(shapes)} tensors, {size} elements", (size,), dtype,
             partial(_accumulate, dtype_of(dtype)), size)
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


def _flush(plan: Plan) -> Problem:
    accumulator = _needs("GradAccumulator")
    shapes = _shapes(plan)
    grads = _gradients(shapes, torch.float32, plan.device)
    ours = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    window = accumulator(ours, max_norm=MAX_NORM)
    wide = [g.double() / ITEMS for g in grads]
    norm = torch.stack([w.square().sum() for w in wide]).sum().sqrt()
    exact = [w * min(1.0, MAX_NORM / (float(norm) + 1e-6)) for w in wide]
    size = sum(g.numel() for g in grads)

    def fill() -> None:
        loss = torch.stack([(p * g).sum() for p, g in zip(ours, grads, strict=True)]).sum()
        window.backward(loss, count=int(ITEMS))

    def copy() -> None:
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()

    def chain() -> None:
        for p in theirs:
            assert p.grad is not None
            p.grad.div_(ITEMS)
        torch.nn.utils.clip_grad_norm_(theirs, MAX_NORM)

    def check(parameters: list[torch.nn.Parameter]) -> Callable[[Any], float]:
        return lambda _: _error([p.grad for p in parameters if p.grad is not None], exact)

    bare = [g.clone() for g in grads]
    ways = [
        Way("torch", chain, copy, check(theirs), bytes=12 * size),
        *_tiers(Way("mbkern", window.flush, fill, check(ours), bytes=12 * size), plan),
        Way("limit: bare pass", lambda: [b.neg_() for b in bare], bytes=8 * size, limit=True),
    ]
    return Problem(ways, CLIPPED)


def flush(plan: Plan) -> list[Case]:
    """Divide by the count and clip the norm."""
    _needs("GradAccumulator")
    size = sum(torch.Size(s).numel() for s in _shapes(plan))
    return [Case("flush", f"gpt-2, {size} elements, clipped", (size,), "float32", _flush, size)]
