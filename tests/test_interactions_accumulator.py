"""A module that is moved, cast or laid out otherwise beside its accumulator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from windows import model

from mbkern import GradAccumulator

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def window(acc: GradAccumulator, net: nn.Module, x: Tensor) -> None:
    for part in x.split(4):
        acc.backward(net(part).square().sum(), count=len(part))


@pytest.mark.parametrize("layout", ["flat", "parameter"])
@pytest.mark.parametrize("when", ["before", "between", "within"])
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
     lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, fused=True)],
)  # fmt: skip
def test_gradients_lie_as_parameters_do(optimizer: Any, when: str, layout: str) -> None:
    """Fused optimizers take both memories for alike, and would exchange the elements."""
    net = convolution()
    plain, x = copy.deepcopy(net), images()
    acc = GradAccumulator(net, layout=layout)
    if when == "between":
        window(acc, net, x)
        acc.flush()
    if when == "within":
        acc.backward(net(x[:2]).square().sum(), count=2)
    for module in (net, plain):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.zero_grad()
    ours, torchs = optimizer(net.parameters()), optimizer(plain.parameters())
    for step in range(2):
        window(acc, net, x[2:] if when == "within" and step == 0 else x)
        acc.flush()
        torchs.zero_grad()
        (plain(x).square().sum() / 6).backward()
        for p in net.parameters():
            assert p.grad is not None
            assert p.grad.stride() == p.stride()
        ours.step()
        torchs.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6


@pytest.mark.parametrize("into", ["grad", "main_grad", "fp32_grad"])
@pytest.mark.parametrize("first", [False, True])
def test_a_module_cast_between_windows(into: str, first: bool) -> None:
    """``module.to`` exchanges the memory of what is in .grad: that must not be the buffer."""
    if into == "fp32_grad" and not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    net, x = model(torch.float32), torch.randn(6, 6)
    acc = GradAccumulator(net, into=into)
    if first:
        window(acc, net, x)
        acc.flush()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        net.to(dtype)
        net.zero_grad()
        window(acc, net, x.to(dtype))
        acc.flush()
        twin = copy.deepcopy(net).double()
        (twin(x.double()).square().sum() / 6).backward()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            grad = p.main_grad if into == "main_grad" else p.grad
            assert isinstance(grad, Tensor)
            assert q.grad is not None
            if into == "grad" or dtype != torch.bfloat16:
                assert grad.dtype is dtype
            else:
                assert grad.dtype is torch.float32
            bound = {torch.bfloat16: 0.1, torch.float64: 1e-13, torch.float32: 1e-5}[dtype]
            assert (grad.double() - q.grad).abs().max() <= bound * q.grad.abs().max()


@pytest.mark.parametrize("change", ["channels_last", "double", "share_memory"])
def test_sums_stay_in_the_memory_that_ranks_add_up(change: str) -> None:
    """Over ranks the allocation is all-reduced whose views the buffers are."""
    net, x = convolution(), images()
    acc = GradAccumulator(net)
    window(acc, net, x)
    acc.flush()
    if change == "channels_last":
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif change == "double":
        net.double()
    else:
        net.share_memory()
    net.zero_grad()
    window(acc, net, x.to(next(net.parameters()).dtype))
    for slot in acc._members.slots:
        (buffer,) = slot.buffers
        base = buffer if buffer._base is None else buffer._base
        assert base.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_a_cast_within_a_window() -> None:
    """Sums stay fp32; the gradient gets the parameter's new type."""
    net, x = model(torch.float32), torch.randn(6, 6)
    acc = GradAccumulator(net)
    acc.backward(net(x[:2]).square().sum(), count=2)
    net.bfloat16()
    acc.backward(net(x[2:].bfloat16()).square().sum(), count=4)
    acc.flush()
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.bfloat16}


def test_a_shape_changed_within_a_window_is_an_error_and_between_is_none() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    acc = GradAccumulator([p])
    acc.backward(p.sum(), count=1)
    p.data = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"parameter 0 is \(2, 2\).*change parameters between"):
        acc.flush()
    acc.reset()
    acc.backward(p.sum(), count=2)
    acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [[0.5, 0.5]] * 2


def test_a_state_of_another_type_is_loaded_after_a_cast() -> None:
    net, x = model(torch.float64), torch.randn(6, 6).double()
    acc = GradAccumulator(net)
    acc.backward(net(x).square().sum(), count=6)
    other = copy.deepcopy(net).float()
    resumed = GradAccumulator(other)
    other.double()
    resumed.load_state_dict(acc.state_dict())
    acc.flush()
    resumed.flush()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
