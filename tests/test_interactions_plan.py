"""A plan beside an accumulator of the same parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from windows import model

import mbkern
from mbkern import GradAccumulator

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("mode", ["deferred", "streaming"])
def test_a_plan_is_no_backward_outside(mode: str) -> None:
    """It puts gradients back; the accumulator's own is then still its own."""
    net, x = model(torch.float32), torch.randn(6, 6)
    acc = GradAccumulator(net, mode=mode)
    acc.backward(net(x).square().sum(), count=6)
    acc.flush()
    if mode == "streaming":
        acc.backward(net(x[:2]).square().sum(), count=2)
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    mbkern.plan(lambda part: F.mse_loss(net(part), part[:, :5], reduction="sum"), x, 6, seconds=0.0)
    for p, old in zip(net.parameters(), before, strict=True):
        assert p.grad is not None
        assert old is not None
        assert torch.equal(p.grad, old)
    acc.backward(net(x).square().sum(), count=6)  # not refused
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match="backward outside a micro-batch"):
        acc.flush()
