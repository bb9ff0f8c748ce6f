"""Whole windows on a GPU have the CPU's bits, and nobody waits; they run on the CPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_cuda import cpu_kernels, same
from torch import Tensor

import mbkern

Found = dict[str, Tensor]
SHAPES = ((300, 41), (7,), (), (0, 3), (2000,), (33, 5))
DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float64, torch.float16)
COUNTS = (5, 1, 4, 2)  # of the micro-batches of a window
BOTH: dict[str, Any] = {"denominators": ("a", "b")}
CASES: dict[str, dict[str, Any]] = {
    "deferred": {"max_norm": 0.5},
    "deferred, penalties": {"l1": 0.1, "l2": 0.2, "layout": "parameter"},
    "deferred, denominators": BOTH,
    "deferred, noise scale": {"noise_scale": True, "max_norm": 0.5},
    "streaming": {"mode": "streaming"},
    "streaming, denominators": {"mode": "streaming", **BOTH},
    "streaming, noise scale": {"mode": "streaming", "noise_scale": True},
    "known": {"mode": "known", "measure": True},
    "known, denominators": {"mode": "known", "max_norm": 0.5, **BOTH},
}


@pytest.fixture(params=["cpu", pytest.param("device", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and where CUDA's kernels run."""
    if request.param == "cpu":
        return torch.device("cpu")
    found: torch.device = request.getfixturevalue("device")
    return found


@contextmanager
def waiting_raises(device: torch.device) -> Iterator[None]:
    """Inside, torch raises where it would wait for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Training:
    """Parameters, and micro-batches whose gradients are given, the same on every device."""

    def __init__(self, device: torch.device, options: dict[str, Any]) -> None:
        self.random, self.device = torch.Generator().manual_seed(3), device
        self.parameters = [
            torch.nn.Parameter(self.numbers(shape).to(device, dtype))
            for shape, dtype in zip(SHAPES, DTYPES, strict=True)
        ]
        named = [(f"p{k}", p) for k, p in enumerate(self.parameters)]
        self.accumulator = mbkern.GradAccumulator(named, **options)
        self.names = options.get("denominators", ("",))

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def micro_batches(self) -> list[list[Tensor | None]]:
        """The gradients of a window's; some parameters have none in some of them."""
        return [
            [
                self.numbers(p.shape).to(p) if (k + at) % 4 else None
                for at, p in enumerate(self.parameters)
            ]
            for k in range(len(COUNTS))
        ]

    def window(self, micro_batches: list[list[Tensor | None]], counts: list[Any]) -> Found:
        """Sums and gradients, as they are after every step, and what is known of them."""
        accumulator, names, found = self.accumulator, self.names, {}
        if accumulator.mode == "known":
            accumulator.begin(
                {name: sum(counts[at :: len(names)]) for at, name in enumerate(names)}
            )
        for k, gradients in enumerate(micro_batches):
            of = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
            loss: Any = sum((p * g).sum() for p, g in of)
            accumulator.backward(loss, counts[k], names[k % len(names)])
            found |= self.gradients(f"after {k}")
        for slot in accumulator._members.slots:
            for which, buffer in enumerate(slot.buffers):
                if slot.received[which]:
                    found[f"sum {slot.name} {which}"] = buffer.clone()
        stats = accumulator.flush()
        found |= self.gradients("at the end")
        found |= {f"square {name}": square for name, square in stats.squared_norms.items()}
        for k, measured in enumerate(stats.measurements):
            found[f"measured {k}"] = measured.squared_norms
        for name in ("norm", "clip_factor", "found_inf", "penalty", "noise_scale"):
            if getattr(stats, name) is not None:
                found[name] = getattr(stats, name)
        return found

    def gradients(self, when: str) -> Found:
        """Copies of those that are there."""
        return {
            f"grad {k} {when}": p.grad.clone()
            for k, p in enumerate(self.parameters)
            if p.grad is not None
        }


def results(device: torch.device, options: dict[str, Any]) -> list[Found]:
    """Of three windows; the first one warms up."""
    training, found = Training(device, options), []
    for k in range(3):
        micro_batches = training.micro_batches()
        on_host = (4, 2, 0)[k]  # so many of the counts
        counts = [
            n if at < on_host else torch.full((), n, device=device) for at, n in enumerate(COUNTS)
        ]
        if k == 0:
            found.append(training.window(micro_batches, counts))
            continue
        with waiting_raises(device):
            found.append(training.window(micro_batches, counts))
    training.accumulator.close()
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_a_window_on_a_device(case: str, where: torch.device) -> None:
    with cpu_kernels():
        want = results(torch.device("cpu"), CASES[case])
    for k, (here, there) in enumerate(zip(want, results(where, CASES[case]), strict=True)):
        assert {tensor.device.type for tensor in there.values()} == {where.type}
        moved = {name: tensor.cpu() for name, tensor in there.items()}
        # torch's own sums of a few norms, in an order of each device's; a difference of them.
        scales = [found.pop("noise_scale", torch.ones(())) for found in (moved, here)]
        torch.testing.assert_close(*scales, rtol=1e-9, atol=0)
        same(moved, here, f"window {k}")
        assert here["norm"] > 0
