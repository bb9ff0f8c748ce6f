"""Losses that are defined for some numbers only refuse the others, and write nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mbkern
from mbkern import functional as F

pytestmark = pytest.mark.cpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN, INF = float("nan"), float("inf")


def shares(size: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0, 1, size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["input", "target"])
@pytest.mark.parametrize("bad", [-1e-3, 1.01, NAN, INF, -INF])
def test_probabilities(dtype: torch.dtype, which: str, bad: float) -> None:
    tensors = {"input": shares(701, dtype), "target": shares(701, dtype).flip(0)}
    tensors[which][613] = bad
    message = rf"\[0, 1\]; {which} holds numbers from "
    with pytest.raises(ValueError, match=message):
        F.binary_cross_entropy(tensors["input"], tensors["target"])
    before = {name: t.clone() for name, t in tensors.items()}
    x, y = tensors["input"], tensors["target"]
    with pytest.raises(ValueError, match=message):
        mbkern.loss_and_grad("binary_cross_entropy", x, y, grad_out=x)
    buffer = torch.full((701,), 3.0, dtype=torch.promote_types(dtype, torch.float32))
    with pytest.raises(ValueError, match=message):
        mbkern.loss_and_grad("binary_cross_entropy", x, y, grad_out=buffer, accumulate=True)
    total = mbkern.LossSum().add(torch.tensor([1.5]))
    state, out = total.state.clone(), torch.full_like(x, 0.25)
    calls: list[dict[str, Any]] = [{"grad_out": out}, {"argnums": 1, "grad_out": out}]
    if dtype is not torch.float64:
        calls.append({"loss_sum": total})
    for call in calls:
        with pytest.raises(ValueError, match=message):
            mbkern.loss_and_grad("binary_cross_entropy", x, y, **call)
    assert torch.equal(total.state, state)
    assert (buffer == 3).all()
    assert (out == 0.25).all()
    assert all(torch.equal(t.nan_to_num(9), before[n].nan_to_num(9)) for n, t in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beside", [1.0, NAN, INF])
def test_variances(dtype: torch.dtype, beside: float) -> None:
    x, y, var = (shares(701, dtype) for _ in range(3))
    var[5] = beside
    assert F.gaussian_nll_loss(x, y, var).isnan() == (beside != beside)
    for bad in (-0.5, -INF):
        var[613] = bad
        with pytest.raises(ValueError, match=r"takes variances; var holds -"):
            F.gaussian_nll_loss(x, y, var)
        with pytest.raises(ValueError, match=r"takes variances; var holds -"):
            mbkern.loss_and_grad("gaussian_nll_loss", x, y, var, grad_out=x)
        assert torch.equal(x, shares(701, dtype))


def test_nothing_is_in_every_domain() -> None:
    empty = torch.empty(0)
    assert F.binary_cross_entropy(empty, empty).isnan()
    assert F.gaussian_nll_loss(empty, empty, empty, reduction="sum") == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(dtype: torch.dtype) -> None:
    """The numbers next to the limits; -0 is within, in any layout, and what is negated lazily."""
    one, zero = torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype)
    above, below = torch.nextafter(one, 2 * one), torch.nextafter(zero, -one)
    for number, good in ((one, True), (-zero, True), (above, False), (below, False)):
        x = shares(702, dtype).view(2, 351).t()
        x[7, 1] = number
        negated = torch._neg_view(-x)
        for probabilities in (x, negated):
            grad = probabilities.clone()
            if good:
                mbkern.loss_and_grad("binary_cross_entropy", grad, x, grad_out=grad)
                mbkern.functional.binary_cross_entropy(probabilities, x)
                mbkern.functional.gaussian_nll_loss(x, x, probabilities)
                continue
            with pytest.raises(ValueError, match=r"\[0, 1\]"):
                mbkern.loss_and_grad("binary_cross_entropy", grad, x, grad_out=grad)
            with pytest.raises(ValueError, match=r"\[0, 1\]; target"):
                F.binary_cross_entropy(x.clamp(0, 1), probabilities)
            if number < 0:
                with pytest.raises(ValueError, match="takes variances"):
                    F.gaussian_nll_loss(x, x, probabilities)
