"""Host time: what a call costs before and after its arithmetic, at 32 items of 10 classes.

A sample is the mean of a short block of calls. Timed: the calls, and with a backward also dropping
the last gradient (``x.grad = None``), alike for all. Nothing is overwritten or restored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from suite_settings import Settings, progress
from torch import Tensor

import mbkern
from mbkern.bench.allocator import DEFAULT
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Way, interleave
from suites.problem import worse

STATES = (DEFAULT,)
SUITE = "host"
SHAPE = (32, 10)
CALLS = 50
FORWARD, BOTH = "forward, no grad", "forward + backward"
TORCH, MBKERN, DIRECT = "torch", "mbkern", "mbkern loss_and_grad"

LossFunction = Callable[[Tensor, Tensor], Tensor]


def _forward(loss: LossFunction, x: Tensor, t: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                loss(x, t)

    return run


def _both(loss: LossFunction, x: Tensor, t: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            x.grad = None
            loss(x, t).backward()  # type: ignore[no-untyped-call]

    return run


def _direct(name: str, x: Tensor, t: Tensor) -> Callable[[], None]:
    plain = x.detach()

    def run() -> None:
        for _ in range(CALLS):
            mbkern.loss_and_grad(name, plain, t)

    return run


def _error(value: Any, exact: Tensor) -> float:
    exact = exact.detach()
    return float((value.detach().double() - exact).abs().max() / exact.abs().max())


def run(settings: Settings) -> list[Group]:
    """Both losses, forward alone and with backward, at every number of threads."""
    groups = []
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).requires_grad_()
    for name, t in (
        ("cross_entropy", torch.arange(SHAPE[0]) % SHAPE[1]),
        ("mse_loss", torch.zeros(SHAPE)),
    ):
        losses = {TORCH: getattr(F, name), MBKERN: getattr(mbkern.functional, name)}
        exact = x.detach().double().requires_grad_()
        t64 = t.double() if t.is_floating_point() else t
        exact_loss = losses[TORCH](exact, t64)
        exact_loss.backward()
        assert exact.grad is not None
        errors: dict[str, float] = {}
        for way, loss in losses.items():
            x.grad = None
            value = loss(x, t)
            value.backward()
            errors[way] = worse(_error(value, exact_loss), _error(x.grad, exact.grad))
        value, grad = mbkern.loss_and_grad(name, x.detach(), t)
        errors[DIRECT] = worse(_error(value, exact_loss), _error(grad, exact.grad))

        for threads in settings.threads:
            torch.set_num_threads(threads)
            for what, make in ((FORWARD, _forward), (BOTH, _both)):
                case = f"{name} {SHAPE}, {what}"
                progress(case, threads)
                ways = [Way(way, make(loss, x, t)) for way, loss in losses.items()]
                if what == BOTH:
                    ways.append(Way(DIRECT, _direct(name, x, t)))
                entries: list[Entry] = interleave(
                    ways, settings.effort(1.5, least=30), unit=1e-3 / CALLS
                )
                for entry in entries:
                    entry.error = errors[entry.name]
                    entry.correct = entry.error <= 1e-5
                groups.append(
                    Group(SUITE, case, threads, settings.allocator, "us", TORCH, entries, SHAPE[1])
                )
    return groups
