"""Gradients added into buffers, and buffers flushed, against torch's own calls.

Large: one tensor from memory, in nanoseconds a byte that must be moved; beside it the machine's
in-place read-modify-write, ``x.mul_(c)``. Many: 400 tensors at once, as an optimizer has them.
Everything is in place or into memory that is there already; autograd is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from suite_settings import Settings, progress
from torch import Tensor

import mbkern
from mbkern.bench.allocator import RECYCLED
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Way, interleave
from suites.problem import worse

STATES = (RECYCLED,)
SUITE = "accumulate"
RMW, TORCH, CAST, MBKERN = "x *= c", "torch", "torch, cast before", "mbkern"
MEASURED = "mbkern, norm and finiteness"
LARGE, QUICK = 10**8, 10**7
COUNT, SMALL, MIXED = 400, (1_000, 4_000), (1_000, 100_000)
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
MAX_NORM, WEIGHT_DECAY, ITEMS = 1.0, 1e-2, 1000.0


def _right(way: Callable[[], object], buffers: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether one call adds the gradients once, rounding once."""
    exact = [b.double() + g.double() for b, g in zip(buffers, grads, strict=True)]
    way()
    pairs = zip(buffers, exact, strict=True)
    return all(bool(((b - e).abs() <= 2.0**-24 * e.abs()).all()) for b, e in pairs)


def _large(dtype: torch.dtype, threads: int, settings: Settings) -> Group:
    n = QUICK if settings.quick else LARGE
    buffer, grad = torch.randn(n), torch.randn(n).to(dtype)
    ways = {
        RMW: lambda: buffer.mul_(1.0000001),
        TORCH: lambda: buffer.add_(grad),
        MBKERN: lambda: mbkern.accumulate_(buffer, grad),
        MEASURED: lambda: mbkern.accumulate_(buffer, grad, measure=True),
    }
    parts = ([buffer[: n // 100]], [grad[: n // 100]])
    good = _right(lambda: mbkern.accumulate_(*parts), *parts)
    entries = interleave([Way(k, w) for k, w in ways.items()], settings.effort(12.0), unit=1 / n)
    moved = {RMW: 8}
    for entry in entries:
        each = moved.get(entry.name, 8 + grad.element_size())
        entry.samples = [sample / each for sample in entry.samples]
        entry.correct = good
    case = f"{NAMES[dtype]} -> fp32, {n} elements"
    return Group(SUITE, case, threads, settings.allocator, "ns/byte", RMW, entries, 1)


def _sizes(least: int, most: int) -> list[int]:
    """Log-uniform, the same each time."""
    random = torch.Generator().manual_seed(0)
    share = torch.rand(COUNT, generator=random).tolist()
    return [int(least * math.exp(s * math.log(most / least))) for s in share]


def _many(sizes: tuple[int, int], dtype: torch.dtype, threads: int, settings: Settings) -> Group:
    buffers = [torch.randn(n) for n in _sizes(*sizes)]
    grads = [torch.randn_like(b).to(dtype) for b in buffers]
    ways = {
        TORCH: lambda: torch._foreach_add_(buffers, grads),
        MBKERN: lambda: mbkern.accumulate_(buffers, grads),
        MEASURED: lambda: mbkern.accumulate_(buffers, grads, measure=True),
    }
    if dtype != torch.float32:
        ways[CAST] = lambda: torch._foreach_add_(buffers, [g.float() for g in grads])
    good = {name: _right(way, buffers, grads) for name, way in ways.items()}
    entries = interleave([Way(k, w) for k, w in ways.items()], settings.effort(5.0), unit=1e-3)
    for entry in entries:
        entry.correct = good[entry.name]
    case = f"{NAMES[dtype]} -> fp32, {COUNT} tensors of {sizes[0]} to {sizes[1]}"
    return Group(SUITE, case, threads, settings.allocator, "us", TORCH, entries, 1)


def _flush(sizes: list[int], dtype: torch.dtype, threads: int, settings: Settings) -> Group:
    sums = [torch.randn(n) for n in sizes]
    parameters = [torch.randn(n).to(dtype) for n in sizes]
    grads = [torch.empty_like(p) for p in parameters]
    total = torch.tensor(ITEMS)
    scratch = [s.clone() for s in sums]

    def separately() -> None:
        torch._foreach_div_(scratch, ITEMS)
        if dtype == torch.float32:
            torch._foreach_add_(scratch, parameters, alpha=WEIGHT_DECAY)
        else:  # mixed dtypes: one by one is faster, casting before faster still
            wide = [p.float() for p in parameters]
            torch._foreach_add_(scratch, wide, alpha=WEIGHT_DECAY)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scratch)))
        torch.stack([s.isfinite().all() for s in scratch]).all()
        torch._foreach_mul_(scratch, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_copy_(grads, scratch)

    def fused() -> None:
        mbkern.flush_(
            grads,
            sums,
            denominator=total,
            parameters=parameters,
            l2=WEIGHT_DECAY,
            max_norm=MAX_NORM,
        )

    def restore() -> None:
        torch._foreach_copy_(scratch, sums)

    # Against fp64. In fp32 the scale, the penalty's term, their sum, the clip factor and the result
    # are rounded, by half a unit each. Torch's fp32 norm of many elements is off by far more.
    exact = [
        s.double() / ITEMS + WEIGHT_DECAY * p.double()
        for s, p in zip(sums, parameters, strict=True)
    ]
    norm = torch.stack([e.square().sum() for e in exact]).sum().sqrt()
    exact = [e * (MAX_NORM / (norm + 1e-6)).clamp(max=1.0) for e in exact]
    largest = max(float(e.abs().max()) for e in exact)
    errors = {}
    for name, way in ((TORCH, separately), (MBKERN, fused)):
        restore()
        way()
        errors[name] = 0.0
        for g, e in zip(grads, exact, strict=True):
            errors[name] = worse(errors[name], float((g - e).abs().max()) / largest)
    del exact
    unit = torch.finfo(dtype).eps
    ways = [Way(TORCH, separately, restore), Way(MBKERN, fused)]
    entries: list[Entry] = interleave(ways, settings.effort(5.0), unit=1e-3)
    for entry in entries:
        entry.error = errors[entry.name]
        entry.correct = entry.error <= (2.5 * unit if entry.name == MBKERN else 1e-2)
    case = f"flush to {NAMES[dtype]}, {len(sizes)} tensors, {sum(sizes)} elements"
    return Group(SUITE, case, threads, settings.allocator, "us", TORCH, entries, 1)


def run(settings: Settings) -> list[Group]:
    """All of it, at every number of threads."""
    groups = []
    with torch.no_grad():
        for threads in settings.threads:
            torch.set_num_threads(threads)
            for dtype in NAMES:
                progress(f"{SUITE} {NAMES[dtype]}", threads)
                groups.append(_large(dtype, threads, settings))
                groups += [_many(sizes, dtype, threads, settings) for sizes in (SMALL, MIXED)]
                large = [LARGE // 40] * (4 if settings.quick else 16)
                groups.append(_flush(_sizes(*MIXED), dtype, threads, settings))
                groups.append(_flush(large, dtype, threads, settings))
    return groups
