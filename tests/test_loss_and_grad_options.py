"""mbkern.loss_and_grad takes the options that the functions take, and means the same by them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, REDUCTIONS, Case
from torch import Tensor

import mbkern.functional as F
from mbkern import loss_and_grad, losses

pytestmark = pytest.mark.cpu
#: What only the functions take: torch's deprecated words, what autograd needs, and a norm that is
#: always 2.
OF_FUNCTIONS = {"size_average", "reduce", "extras", "p of triplet_margin_loss"}
ZEROS = [0, 0.0, -0.0, False, np.float32(0)]


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x, t = torch.randn(5, 70).to(dtype), torch.randn(5, 70).to(dtype)
    t[0, 0] = x[0, 0]  # the kink
    return x, t


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smooth_l1_loss_of_beta_zero(dtype: torch.dtype, reduction: str) -> None:
    """It is l1_loss, as in torch: with the bits of the function, and of l1_loss itself."""
    x, t = pair(dtype)
    both, beta = (0, 1), 0
    value, grads = loss_and_grad(
        "smooth_l1_loss", x, t, argnums=both, reduction=reduction, beta=beta
    )
    wanted = loss_and_grad("l1_loss", x, t, argnums=both, reduction=reduction)
    leaves = [x.clone().requires_grad_(), t.clone().requires_grad_()]
    loss = F.smooth_l1_loss(*leaves, reduction=reduction, beta=beta)
    by_autograd = torch.autograd.grad(loss.sum(), leaves)
    assert torch.equal(value, loss.detach())
    assert torch.equal(value, wanted[0])
    for got, want, other in zip(grads, wanted[1], by_autograd, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(got, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smooth_l1_loss_of_beta_zero_accumulates(dtype: torch.dtype) -> None:
    x, t = pair(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    options: dict[str, Any] = {"accumulate": True, "sample_weight": torch.rand(5, 70), "scale": 0.5}
    found = []
    for name, more in (("smooth_l1_loss", {"beta": 0}), ("l1_loss", {})):
        out = torch.full_like(x, 0.25, dtype=wide)
        found.append((loss_and_grad(name, x, t, grad_out=out, **options, **more)[0], out))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_smooth_l1_loss_of_beta_zero_of_arrays() -> None:
    x, t = (v.numpy() for v in pair())
    wanted = loss_and_grad("l1_loss", x, t)
    for beta in ZEROS:
        value, grad = loss_and_grad("smooth_l1_loss", x, t, beta=beta)
        assert isinstance(grad, np.ndarray)
        assert value == wanted[0]
        assert np.array_equal(grad, wanted[1])


def test_smooth_l1_loss_of_beta_zero_is_refused_by_its_own_name() -> None:
    x, t = pair()
    with pytest.raises(TypeError, match="smooth_l1_loss has no option 'weight'"):
        loss_and_grad("smooth_l1_loss", x, t, beta=0, weight=x)
    with pytest.raises(ValueError, match="not a differentiable argument of smooth_l1_loss"):
        loss_and_grad("smooth_l1_loss", x, t, beta=0, argnums=2)
    for beta in (torch.zeros(()), "0", None):
        with pytest.raises(TypeError, match="beta must be a number"):
            loss_and_grad("smooth_l1_loss", x, t, beta=beta)
    with pytest.raises(ValueError, match="beta must be in"):
        loss_and_grad("smooth_l1_loss", x, t, beta=-1)


def test_batchmean_of_kl_div() -> None:
    """torch's word, for rows, a vector and a number."""
    for shape in ((5, 7), (7,), ()):
        x, t = torch.randn(shape), torch.rand(shape)
        leaf = x.clone().requires_grad_()
        loss = F.kl_div(leaf, t, reduction="batchmean")
        (wanted,) = torch.autograd.grad(loss, leaf)
        value, grad = loss_and_grad("kl_div", x, t, reduction="batchmean")
        assert torch.equal(value, loss.detach())
        assert torch.equal(grad, wanted)
    with pytest.raises(ValueError, match="denominator goes with reduction='mean', not 'batchmean'"):
        loss_and_grad("kl_div", x, t, reduction="batchmean", denominator=2)
    with pytest.raises(ValueError, match="'batchmean' is not a valid reduction"):
        loss_and_grad("mse_loss", x, t, reduction="batchmean")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_option_of_the_function_is_one_here(case: Case) -> None:
    """With its default it changes nothing."""
    s = case.sample((6, 70), torch.float32)
    plain = loss_and_grad(case.name, s.input, s.target, **s.options | {"reduction": "mean"})
    parameters = inspect.signature(getattr(F, case.name)).parameters
    loss = next(loss for loss in losses() if loss.name == case.name)
    names = parameters.keys() - set(loss.arguments) - {"reduction"} - s.options.keys()
    names = {n for n in names if not OF_FUNCTIONS & {n, f"{n} of {case.name}"}}
    for name in sorted(names - {"inplace", "grad_scale"}):  # of autograd; here grad_out and scale
        default = parameters[name].default
        given = {**s.options, "reduction": "mean", name: default}
        value, grad = loss_and_grad(case.name, s.input, s.target, **given)
        assert torch.equal(value, plain[0]), name
        assert torch.equal(grad, plain[1]), name


def test_the_names_that_are_accepted() -> None:
    """An unknown one is answered with all of them, the head's among them, and each is one."""
    x, t = pair()
    with pytest.raises(ValueError, match="unknown loss 'mse'") as caught:
        loss_and_grad("mse", x, t)
    named = str(caught.value).rpartition("available: ")[2].split(", ")
    assert named == [*(loss.name for loss in losses()), "linear_cross_entropy"]
    for name in named:  # each is known: what is wrong is that there are no tensors
        with pytest.raises(TypeError, match=f"{name} takes .* is missing"):
            loss_and_grad(name)


@pytest.mark.parametrize(
    "name",
    [torch.ones(3), np.ones(3), F.mse_loss, None, ["mse_loss"]],
    ids=["tensor", "array", "function", "none", "list"],  # the same in every process
)
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(TypeError, match="the name of a loss comes first, then its tensors; not"):
        loss_and_grad(name, *pair())
