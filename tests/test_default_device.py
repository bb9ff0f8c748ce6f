"""A default device, by a call or a block, changes nothing of what has tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import mbkern
from mbkern import functional as F


def _same(run: Callable[[], Any]) -> None:
    """The same under another default device, where no tensor is made without a device."""
    want = run()
    with torch.device("meta"):
        got = run()
    for a, b in zip(want, got, strict=True):
        assert a.device == b.device
        assert torch.equal(a, b)


def test_imported_under_another_default_device() -> None:
    """What is made once must not lie on it: results of 0 dimensions are made like it."""
    program = """
import torch
torch.set_default_device("meta")
import mbkern
x = torch.ones(3, 5, device="cpu", requires_grad=True)
loss = mbkern.functional.mse_loss(x, torch.zeros(3, 5, device="cpu"))
loss.backward()
print(loss.item(), x.grad.sum().item())
sums = mbkern.LossSum("cpu")
mbkern.loss_and_grad("mse_loss", x.detach(), x.grad, loss_sum=sums)
print(round(sums.value(15).item(), 4))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["1.0", "2.0", "0.7511"], done.stderr


def test_in_place_stays_in_place() -> None:
    x, target = torch.randn(4, 7, requires_grad=True), torch.tensor([0, 6, 3, 2])

    def run() -> tuple[torch.Tensor, ...]:
        logits = x * 2
        loss = F.cross_entropy(logits, target, inplace=True)
        (grad,) = torch.autograd.grad(loss, x)
        return loss, grad, logits  # over which the gradient lies

    _same(run)
    assert torch.equal(run()[1], run()[2] * 2)


def test_a_buffer_of_the_head_is_added_to() -> None:
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    target = torch.randint(20, (6,))

    def run() -> tuple[torch.Tensor, ...]:
        x.grad = w.grad = None
        loss = F.linear_cross_entropy(x, w, target, accumulate_into="grad")
        loss.backward()
        return loss.detach(), x.grad, w.grad

    _same(run)


def test_a_window() -> None:
    model, data = torch.nn.Linear(5, 3), torch.randn(4, 5)
    windows = mbkern.GradAccumulator(model, noise_scale=True, max_norm=1.0)

    def run() -> tuple[torch.Tensor, ...]:
        for part in data.split(2):
            windows.backward(model(part).square().sum(), count=2)
        stats = windows.flush()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return stats.norm, stats.found_inf, *grads

    _same(run)
