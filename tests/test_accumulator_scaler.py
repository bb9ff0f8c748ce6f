"""mbkern.GradAccumulator with a GradScaler, and sums that would overflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from windows import gradients, model

from mbkern import GradAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test says otherwise


def scaled_step(overflow: bool) -> tuple[list[Tensor], float, nn.Module]:
    net = model(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    acc = GradAccumulator(net)
    for k in range(3):
        x = torch.full((4, 6), float("inf") if overflow and k == 1 else 0.5)
        acc.backward(scaler.scale(net(x).square().sum()), count=4)
    stats = acc.flush(scaler=scaler, optimizer=optimizer)
    grads = [g.clone() for g in gradients(net) if g is not None]
    scaler.step(optimizer)
    scaler.update()
    assert stats.found_inf == float(overflow)
    return grads, scaler.get_scale(), net


def test_grad_scaler() -> None:
    before = list(model(torch.float32).parameters())
    grads, scale, net = scaled_step(overflow=False)
    assert scale == 2.0**11
    plain = model(torch.float32)
    loss = plain(torch.full((4, 6), 0.5)).square().sum() / 4
    exact = torch.autograd.grad(loss, list(plain.parameters()))
    for p, b, g, e in zip(net.parameters(), before, grads, exact, strict=True):
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-7)
        assert torch.allclose(p, b - e, rtol=1e-5, atol=1e-6), "unscaled twice, or not at all"


def test_grad_scaler_overflow() -> None:
    before = list(model(torch.float32).parameters())
    _, scale, net = scaled_step(overflow=True)
    assert scale == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_grad_scaler_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    acc = GradAccumulator(net)
    with pytest.raises(ValueError, match="needs optimizer="):
        acc.flush(scaler=scaler)
    with pytest.raises(TypeError, match=r"must be a torch\.amp\.GradScaler"):
        acc.flush(scaler=3, optimizer=optimizer)
    acc.backward(net(torch.ones(2, 6)).sum(), 2)
    with pytest.raises(RuntimeError, match="has scaled no loss"):
        acc.flush(scaler=scaler, optimizer=optimizer)
    acc.reset()
    acc.backward(scaler.scale(net(torch.ones(2, 6)).sum()), 2)
    acc.flush(scaler=scaler, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="has unscaled this optimizer"):
        acc.flush(scaler=scaler, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.unscale_(optimizer)
    off = torch.amp.GradScaler("cpu", enabled=False)
    acc.flush(scaler=off, optimizer=optimizer)
    monkeypatch.setattr(torch, "__version__", "3.1.0")
    with pytest.raises(NotImplementedError, match=r"3\.1\.0"):
        acc.flush(scaler=scaler, optimizer=optimizer)


def test_pre_scale_keeps_sums_finite() -> None:
    p = nn.Parameter(torch.ones(8, dtype=torch.float16))
    x = torch.full((8,), 6e4, dtype=torch.float16)
    for pre_scale, good in ((1.0, False), (2.0**-6, True)):
        p.grad = None
        acc = GradAccumulator([p], pre_scale=pre_scale)
        acc.backward(4 * (p * x).float().sum(), count=32)
        assert acc.flush().found_inf == float(not good)
    assert (p.grad == 7500).all()
