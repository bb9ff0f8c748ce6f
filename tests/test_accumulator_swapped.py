"""Parameters under whose names torch.utils.swap_tensors puts other tensors, without their hooks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mbkern import GradAccumulator

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="NOT CHECKED: torch without Tensor.grad_dtype"
)


def ones() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


def swap(p: nn.Parameter) -> nn.Parameter:
    other = nn.Parameter(torch.full((2,), 3.0))
    torch.utils.swap_tensors(p, other)
    assert p.tolist() == [3, 3]
    return other


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("mode", ["deferred", "streaming"])
@pytest.mark.parametrize("before", [0, 1])
def test_gradients_of_a_swapped_parameter_are_counted(mode: str, before: int) -> None:
    p = ones()
    acc = GradAccumulator([p], mode=mode)
    for _ in range(before):
        acc.backward((5 * p).sum(), 1)
    other = swap(p)
    for _ in range(3):
        acc.backward((5 * p).sum(), 1)
    acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [5, 5]
    assert other.grad is None or mode == "streaming"  # the gradient left went with the tensor


def test_the_other_tensor_is_nothing_to_the_accumulator() -> None:
    """It has the old tensor, and what torch calls for that one's gradients."""
    p = ones()
    acc = GradAccumulator([p])
    other = swap(p)
    with acc.micro_batch(1):
        (other.sum() + 2 * p.sum()).backward()
    acc.flush()
    assert p.grad is not None
    assert other.grad is not None
    assert (p.grad.tolist(), other.grad.tolist()) == ([2, 2], [1, 1])


def test_two_parameters_of_one_accumulator_change_places() -> None:
    p, q = ones(), ones()
    acc = GradAccumulator([p, q])
    seen: list[str] = []
    p.register_post_accumulate_grad_hook(lambda _: seen.append("p"))
    torch.utils.swap_tensors(p, q)
    for _ in range(2):
        acc.backward((2 * p + 3 * q).sum(), 1)
    acc.flush()
    assert p.grad is not None
    assert q.grad is not None
    assert (p.grad.tolist(), q.grad.tolist()) == ([2, 2], [3, 3])
    p.grad = q.grad = None  # which would change places, too
    torch.utils.swap_tensors(p, q)
    acc.backward((2 * p + 3 * q).sum(), 1)
    acc.flush()
    assert (p.grad.tolist(), q.grad.tolist()) == ([2, 2], [3, 3])


def test_two_accumulators_of_one_parameter() -> None:
    p = ones()
    accs = [GradAccumulator([p]) for _ in range(2)]
    swap(p)
    for k, acc in enumerate(accs):
        acc.backward(((k + 1) * p).sum(), 1)
    for k, acc in enumerate(accs):
        acc.flush()
        assert p.grad is not None
        assert p.grad.tolist() == [k + 1] * 2
    accs[0].close()
    accs[1].backward(p.sum(), 1)
    accs[1].flush()
    assert p.grad.tolist() == [1, 1]


def test_a_backward_outside_is_not_overwritten() -> None:
    p = ones()
    acc = GradAccumulator([p])
    acc.backward(p.sum(), 1)
    swap(p)
    (10 * p).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="a backward outside a micro-batch"):
        acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [10, 10]


def test_a_swap_that_is_not_seen_is_an_error_once() -> None:
    """Where torch has reused the memory of the first tensor for the third."""
    p = ones()
    acc = GradAccumulator([p])
    swap(p)
    acc._members.slots[0].hooked = p._cdata
    with pytest.raises(RuntimeError, match=r"that no hook saw: .* the parameter swapped"):
        acc.backward(p.sum(), 1)
    acc.backward(p.sum(), 1)
    acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [1, 1]


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize(
    "into", ["grad", "main_grad", pytest.param("fp32_grad", marks=needs_grad_dtype)]
)
def test_module_to_swaps(into: str) -> None:
    net = nn.Linear(2, 1)
    acc = GradAccumulator(net, into=into)
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.bfloat16):
        before = net.weight
        net.to(dtype)
        assert net.weight is before
        x = torch.ones(1, 2, dtype=dtype)
        for _ in range(2):
            acc.backward(net(x).sum(), 1)
        acc.flush()
        grad = net.weight.main_grad if into == "main_grad" else net.weight.grad
        assert grad.tolist() == [[1, 1]]
        net.zero_grad(set_to_none=True)


@pytest.mark.usefixtures("swapping")
def test_load_state_dict_swaps_in_mid_window() -> None:
    net = nn.Linear(2, 1, bias=False)
    acc = GradAccumulator(net)
    x = torch.ones(1, 2)
    acc.backward(net(x).sum(), 1)
    net.load_state_dict({"weight": torch.full((1, 2), 3.0)})
    acc.backward(net(x).sum(), 1)
    acc.flush()
    assert net.weight.grad.tolist() == [[1, 1]]


@needs_grad_dtype
def test_a_swapped_parameter_takes_a_gradient_of_another_dtype() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    acc = GradAccumulator([p], into="fp32_grad")
    torch.utils.swap_tensors(p, nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    acc.backward(p.sum(), 1)
    acc.flush()
    assert p.grad is not None
    assert p.grad.dtype is torch.float32
