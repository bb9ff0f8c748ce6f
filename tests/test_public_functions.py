"""``mbkern.autograd``: the Functions, called as its docstring shows."""

from __future__ import annotations

import torch

import mbkern
from mbkern import functional
from mbkern.autograd import Request, RowLoss, RowOptions, TensorLoss, TensorOptions


def _loss(name: str) -> mbkern.Loss:
    (loss,) = (loss for loss in mbkern.losses() if loss.name == name)
    return loss


def test_a_loss_of_rows() -> None:
    logits, target = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    request = Request(_loss("cross_entropy"), RowOptions(reduction="sum", z_loss=1e-4))
    value = RowLoss.apply(logits, target, request)
    want = functional.cross_entropy(logits, target, reduction="sum", z_loss=1e-4)
    assert torch.equal(value, want)
    assert torch.equal(*(torch.autograd.grad(v, logits)[0] for v in (value, want)))


def test_a_loss_of_elements() -> None:
    x, y = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    loss = _loss("huber_loss")
    options = TensorOptions(parameters=loss.numbers(delta=0.5))
    value = TensorLoss.apply(x, y, None, Request(loss, options))
    want = functional.huber_loss(x, y, delta=0.5)
    assert torch.equal(value, want)
    assert torch.equal(*(torch.autograd.grad(v, x)[0] for v in (value, want)))
