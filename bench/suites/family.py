"""The loss family: loss and gradient of element-wise losses and of losses of rows, against torch.

Timed as in the suite cross-entropy. Where torch has no such function, its way is the usual chain of
operations. The limit of what works in place is a bare pass over the same buffers, ``x.add_(y)`` or,
of three, ``x.addcmul_(y, z)``: each is read once, and one is written. At 2^12 elements a sample is
the mean of a block of calls: what is measured there is the host's time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from suite_settings import NONE, Settings, progress
from torch import Tensor

import mbkern
from mbkern.bench.allocator import DEFAULT, RECYCLED
from mbkern.bench.formulas import ELEMENTS as FORMULAS_OF_ELEMENTS
from mbkern.bench.formulas import ROUGH_IN_BF16, Formula, tensors
from mbkern.bench.formulas import ROWS as FORMULAS_OF_ROWS
from mbkern.bench.results import Group
from mbkern.bench.timing import Effort, Way, interleave
from suites.problem import TOLERANCE, worse

STATES = (DEFAULT, RECYCLED)
ELEMENTS, ROWS = "elements", "rows"
TORCH, COMPILED = "torch", "torch.compile"
AUTOGRAD, IN_PLACE = "mbkern autograd", "mbkern in place"
LIMIT = "limit: bare pass"
LARGE, SMALL = 1 << 24, 1 << 12
CALLS = 100

Function = Callable[..., Tensor]
_COMPILED = ("mse_loss", "huber_loss", "binary_cross_entropy_with_logits")
_PAIRS = ("kl_div_with_logits", "js_div_with_logits", "tv_distance_with_logits")


def _gradient(function: Function, x: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
    loss = function(x, *others)
    loss.backward()
    grad = x.grad
    assert grad is not None
    x.grad = None
    return loss.detach(), grad


def _error(result: tuple[Tensor, Any], exact: tuple[Tensor, Tensor]) -> float:
    worst = 0.0
    for a, b in zip(result, exact, strict=True):
        worst = worse(worst, float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-300)))
    return worst


def _exact(loss: Formula, x: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
    wide = [t.detach().double() if t.is_floating_point() else t for t in (x, *others)]
    return _gradient(loss.torch, wide[0].requires_grad_(), wide[1:])


def _in_place(loss: Formula, x: Tensor, others: list[Tensor]) -> tuple[Tensor, Any]:
    return mbkern.loss_and_grad(loss.name, x, *others, grad_out=x, **dict(loss.options))


def _large(
    suite: str, loss: Formula, shape: tuple[int, ...], dtype: torch.dtype, threads: int,
    settings: Settings,
) -> Group:  # fmt: skip
    pristine, *others = tensors(loss, shape, dtype)
    x, plain = pristine.clone().requires_grad_(), pristine.clone()
    few = slice(0, 1 << 16) if len(shape) == 1 else slice(0, 64)
    part = pristine[few].clone().requires_grad_()
    part_of_others = [t[few] for t in others]
    exact = _exact(loss, part, part_of_others)
    ways = {TORCH: loss.torch, AUTOGRAD: loss.ours}
    runs: dict[str, Callable[[], Any]] = {
        name: partial(_gradient, function, x, others) for name, function in ways.items()
    }
    errors = {
        name: _error(_gradient(function, part, part_of_others), exact)
        for name, function in ways.items()
    }
    runs[IN_PLACE] = lambda: _in_place(loss, plain, others)
    errors[IN_PLACE] = _error(_in_place(loss, part.detach(), part_of_others), exact)
    if loss.name in _COMPILED and dtype is torch.float32 and settings.compile != NONE:
        torch._dynamo.reset()
        runs[COMPILED] = partial(_gradient, torch.compile(loss.torch, dynamic=False), x, others)
        errors[COMPILED] = _error(runs[COMPILED](), _exact(loss, x, others))  # for this shape only
    if others and others[0].shape == plain.shape:
        three = len(others) > 1 and others[1].shape == plain.shape
        runs[LIMIT] = lambda: plain.addcmul_(*others[:2]) if three else plain.add_(others[0])
        errors[LIMIT] = 0.0

    def restore() -> None:
        plain.copy_(pristine)

    timed = [Way(name, run, restore) for name, run in runs.items()]
    entries = interleave(timed, settings.effort(1.5, least=5))
    for entry in entries:
        entry.error = errors[entry.name]
        entry.correct = entry.error <= TOLERANCE[dtype] * 4
    short = str(dtype).removeprefix("torch.")
    size = f"2^{shape[0].bit_length() - 1}" if len(shape) == 1 else str(shape)
    label = f"{loss.name} {size} {short}"
    return Group(suite, label, threads, settings.allocator, "ms", TORCH, entries, shape[-1], short)


def _small(loss: Formula, settings: Settings) -> Group:
    pristine, *others = tensors(loss, (SMALL,), torch.float32)
    x = pristine.clone().requires_grad_()
    exact = _exact(loss, x, others)
    functions = {TORCH: loss.torch, AUTOGRAD: loss.ours}

    def block(function: Function) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                _gradient(function, x, others)

        return run

    ways = [Way(name, block(function), calls=CALLS) for name, function in functions.items()]
    effort = Effort(0.0, 0.1, repeats=settings.repeats or 15)
    entries = interleave(ways, effort, unit=1e-3)
    for entry in entries:
        entry.error = _error(_gradient(functions[entry.name], x, others), exact)
        entry.correct = entry.error <= TOLERANCE[torch.float32] * 4
    return Group(
        "host-family", f"{loss.name} 2^12", 1, settings.allocator, "us", TORCH, entries, SMALL
    )


def run(settings: Settings) -> list[Group]:
    """Every loss at its sizes, on every number of threads."""
    groups = []
    quick = settings.quick
    size = (LARGE >> 4,) if quick else (LARGE,)
    for threads in settings.threads:
        torch.set_num_threads(threads)
        for loss in FORMULAS_OF_ELEMENTS:
            for dtype in (torch.float32, torch.bfloat16):
                if loss.name in ROUGH_IN_BF16 and dtype is torch.bfloat16:
                    continue  # torch's own error is beyond any tolerance there
                progress(f"{loss.name} {dtype}", threads)
                groups.append(_large(ELEMENTS, loss, size, dtype, threads, settings))
        for loss in FORMULAS_OF_ROWS:
            shapes = [(4096, 1000), (512, 32000)]
            if loss.name in _PAIRS:
                shapes = [(1024, 32000)]
            for shape in shapes[:1] if quick else shapes:
                progress(f"{loss.name} {shape}", threads)
                groups.append(_large(ROWS, loss, shape, torch.float32, threads, settings))
    torch.set_num_threads(1)
    groups += [_small(loss, settings) for loss in FORMULAS_OF_ELEMENTS]
    return groups
