"""Gradients formed in forward that get lost on the way between two operators."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

import mbkern

OPS = torch.ops.mbkern
X = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))
Y = torch.arange(6) % 5
Z = torch.zeros(6, 10)
ONE, THREE = torch.tensor(1.0), torch.tensor(3.0)
ROW = ("cross_entropy", "mean", 2, 0.1, 0.0, 0.0)  # two items are ignored


def _row(x: Tensor, form: bool) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.linspace(0.5, 1.5, 10)
    return OPS.row_loss(x, Y, weight, None, None, None, *ROW, form, x.dtype)


def _row_backward(x: Tensor, incoming: Tensor, *state: Tensor, form: bool) -> Tensor:
    weight = torch.linspace(0.5, 1.5, 10)
    return OPS.row_loss_backward(incoming, x, Y, weight, None, None, *state, *ROW, form)


def _tensors_backward(divisor: Tensor, incoming: Tensor, form: bool) -> tuple[Tensor, Tensor]:
    options = ("mse_loss", "mean", -100, ())
    return OPS.tensor_loss_backward(
        incoming, X, Z, *[None] * 5, divisor, *options, form, True, True, False
    )[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("incoming", [ONE, THREE])
def test_a_lost_gradient_is_formed_again(dtype: torch.dtype, incoming: Tensor) -> None:
    """From a copy of the divisor, or the second time: the same bits; the first time: no copy."""
    x, incoming = X.to(dtype), incoming.to(dtype)
    plain = mbkern.loss_and_grad(
        "cross_entropy", x, Y, weight=torch.linspace(0.5, 1.5, 10), ignore_index=2,
        label_smoothing=0.1,
    )[1]  # fmt: skip
    _, state, divisor = _row(x, True)
    owned = divisor.untyped_storage().grads[0].data_ptr()
    copied = _row_backward(x, incoming, state, divisor.clone(), form=True)
    first = _row_backward(x, incoming, state, divisor, form=True)
    second = _row_backward(x, incoming, state, divisor, form=True)
    assert first.data_ptr() == owned
    assert len({owned, copied.data_ptr(), second.data_ptr()}) == 3
    want = plain * incoming  # formed, then multiplied: rounded twice
    for got in (first, second, copied):
        assert torch.equal(got, want)
    _, state, divisor = _row(x, False)
    assert torch.equal(_row_backward(x, ONE.to(dtype), state, divisor, form=False), plain)


def test_a_lost_pair_of_gradients_is_formed_again() -> None:
    _, divisor = OPS.tensor_loss(
        X, Z, *[None] * 6, "mse_loss", "mean", -100, (), True, True, False, X.dtype
    )
    copied = _tensors_backward(divisor.clone(), THREE, True)
    first, second = (_tensors_backward(divisor, THREE, True) for _ in range(2))
    assert first[0].data_ptr() != second[0].data_ptr()
    for got in (first, second):
        assert all(map(torch.equal, got, copied))
    assert torch.equal(copied[0], -copied[1])
    assert torch.allclose(copied[0], X * (6 / X.numel()), rtol=1e-6)


def test_gradients_go_with_the_divisor() -> None:
    """Nothing keeps a gradient alive that no backward took."""
    _, _, divisor = _row(X, True)
    grad = weakref.ref(divisor.untyped_storage().grads[0])
    assert grad() is not None
    del divisor
    assert grad() is None
