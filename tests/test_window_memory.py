"""A window's gradients are freed as they are added: there is never a second set of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mbkern

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def allocations(profile: Any) -> list[int]:
    """Bytes allocated and freed, in order."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_of_a_backward(dtype: torch.dtype) -> None:
    """Above what was there before it: one node's gradients, a bucket of 16 MB, activations."""
    width, layers = 1800, 8
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).to(dtype)
    accumulator = mbkern.GradAccumulator(model)
    x = torch.ones(2, width, dtype=dtype)
    for _ in range(2):  # the second time into buffers that hold something
        loss = model(x).float().sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            accumulator.backward(loss, count=2)
        now = peak = 0
        for size in allocations(profile):
            now += size
            peak = max(peak, now)
        largest = width * width * dtype.itemsize
        assert peak <= largest + (16 << 20) + (1 << 20)
        assert layers * largest > 1.5 * (largest + (16 << 20)), "the bound would say nothing"
    accumulator.flush()
