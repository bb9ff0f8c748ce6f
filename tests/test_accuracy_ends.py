"""Gradients that are small differences, or have factors that are no numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import mbkern
from mbkern import functional as F


def _grad(loss: Tensor, x: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, x)
    return grad


def _close(got: Tensor, want: Tensor, eps: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=eps, atol=0)


def test_rates_below_the_least_mean() -> None:
    """There the loss is flat, as its formula with a clamp, which second derivatives are made of."""
    rate = torch.tensor([0.0, 0.5], requires_grad=True)
    for power in (0.0, 1.0, 1.5, 2.0, 3.0):
        loss = F.tweedie_nll_loss(
            rate, torch.tensor([2.0, 2.0]), power=power, log_input=False, reduction="sum"
        )
        assert _grad(loss, rate)[0] == 0


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 1.9, 2.0])
def test_rates_near_their_targets(power: float) -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.rand(1000, generator=g) * 100 + 50
    rate = (target * (1 + (torch.rand(1000, generator=g) - 0.5) / 50)).requires_grad_()
    m, y = rate.detach().double(), target.double()
    loss = F.tweedie_nll_loss(rate, target, power=power, log_input=False, reduction="sum")
    _close(_grad(loss, rate), m**-power * (m - y), 3e-6)


def test_dice_of_what_hardly_overlaps() -> None:
    p = torch.full((1, 16384), 1e-4, requires_grad=True)
    target = torch.zeros(1, 16384)
    target[0, 5] = 1
    wide = p.detach().double().requires_grad_()
    sums = 2 * (wide * target).sum() + 1e-6, wide.sum() + 1 + 1e-6
    _close(_grad(F.dice_loss(p, target, smooth=1e-6), p), _grad(1 - sums[0] / sums[1], wide))


def test_positive_weights_below_one() -> None:
    x = torch.linspace(-30, 30, 601)
    for weight in (0.0, 1e-3, 0.5, 1.0, 20.0):
        results = []
        for f, dtype in ((F, torch.float32), (TF, torch.float64)):
            target = torch.full_like(x, 0.5, dtype=dtype).requires_grad_()
            loss = f.binary_cross_entropy_with_logits(
                x.to(dtype), target, pos_weight=torch.tensor(weight, dtype=dtype), reduction="sum"
            )
            results.append(_grad(loss, target))
        got, want = results
        off = (got - want).abs() - 3e-7 * want.abs()  # where both terms are alike
        assert (off <= 1e-7 * torch.minimum(x.abs() * (1 + weight), torch.tensor(1.0))).all()


@pytest.mark.parametrize("gamma", [0.02, 0.05, 0.1, 0.12])
def test_focal_loss_of_a_confident_right_answer(gamma: float) -> None:
    x = torch.tensor([-95.0, -100.0, -103.0, -3.0], requires_grad=True)
    loss = F.sigmoid_focal_loss(x, torch.zeros(4), gamma=gamma, reduction="none")
    assert (loss[:3] < 1e-38).all()
    grad = _grad(loss.sum(), x)
    assert ((grad >= 0) & (grad < 1)).all()


@pytest.mark.parametrize("cap", [0.1, 1.0, 15.0, 41.0, 47.0, 55.0, 61.0])
def test_saturated_logits_have_no_gradient(cap: float) -> None:
    x = torch.tensor([[1e4, 1e4 - 1, -1e4]], requires_grad=True)
    assert (_grad(F.cross_entropy(x, torch.tensor([1]), softcap=cap), x) == 0).all()


def _cross_entropy_gradient(x: Tensor, q: Tensor, cap: float | None = None) -> Tensor:
    """In fp64, with the slope of the cap as 1 / cosh^2, and the top class's share as all but the
    others'."""
    x, q = x.double(), q.double()
    c = x if cap is None else cap * torch.tanh(x / cap)
    e = torch.exp(c - c.amax(1, keepdim=True))
    total = e.sum(1, keepdim=True)
    top = torch.nn.functional.one_hot(c.argmax(1), x.shape[1]).bool()
    others = e.masked_fill(top, 0).sum(1, keepdim=True)
    pull = q.masked_fill(top, 0).sum(1, keepdim=True)
    near = (pull - q * others) / total  # of the top, whose e is 1
    grad = torch.where(top, near, q.sum(1, keepdim=True) * e / total - q)
    return grad if cap is None else grad / torch.cosh(x / cap) ** 2


# Lanes across rows, along a row, several blocks.
_WIDTHS = [7, 130, 2500]


@pytest.mark.parametrize("columns", _WIDTHS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_slope_of_a_soft_cap_where_it_is_small(columns: int, smoothing: float) -> None:
    g = torch.Generator().manual_seed(columns)
    cap = 5.0
    x = (torch.rand(21, columns, generator=g) * 2 - 1) * 8 * cap
    x[:, 0] = 3 * cap
    target = torch.randint(columns, (21,), generator=g)
    q = torch.full_like(x, smoothing / columns, dtype=torch.float64)
    q[torch.arange(21), target] += 1 - smoothing
    want = _cross_entropy_gradient(x, q, cap)
    terms = (want + 2 * q / torch.cosh(x.double() / cap) ** 2).abs()  # p + q, where p - q cancels
    x.requires_grad_()
    options = {"softcap": cap, "label_smoothing": smoothing, "reduction": "sum"}
    got = [_grad(F.cross_entropy(x, target, **options), x)]
    if smoothing == 0:  # and by class probabilities
        got.append(_grad(F.cross_entropy(x, q.float(), **options), x))
    for grad in got:
        assert ((grad - want).abs() <= 1e-5 * torch.maximum(terms, want.abs())).all()


@pytest.mark.parametrize("columns", _WIDTHS)
def test_class_probabilities_of_a_row_that_fits(columns: int) -> None:
    """The gradient of the top class has the digits of the others', not of 1."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(21, columns, generator=g) - 25
    x[:, columns // 2] = 0
    q = torch.exp(torch.randn(21, columns, generator=g) - 24)
    q[:, columns // 2] = 1
    want = _cross_entropy_gradient(x, q)
    top = want[:, columns // 2]
    assert (top.abs() < 1e-6).all()
    x.requires_grad_()
    got = _grad(F.cross_entropy(x, q, reduction="sum"), x)
    _close(got[:, columns // 2], top, 1e-6)
    got = _grad(F.cross_entropy(x, q, reduction="none").sum(), x)
    _close(got[:, columns // 2], top, 1e-6)


def test_a_square_that_is_too_large_alone() -> None:
    assert F.half_squared_error(torch.tensor([2.2e19]), torch.zeros(1)).isfinite()


def test_second_derivatives_near_zero() -> None:
    x = torch.tensor([1e-6, 1e-3, 0.0, 0.49, 0.51], requires_grad=True)
    loss = F.log_cosh_loss(x, torch.zeros(5), reduction="sum")
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    tanh = x.detach().double().tanh()
    _close(first.detach(), tanh)
    _close(second, 1 - tanh**2, 1e-5)


@pytest.mark.parametrize("split_invariant", [False, True])
def test_a_large_bias_of_the_head_is_added_once(split_invariant: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 512, generator=g), torch.randn(500, 512, generator=g) / 10
    bias, target = torch.full((500,), 100.0), torch.arange(64)
    wide = TF.linear(x.double(), w.double(), bias.double())
    exact = TF.cross_entropy(wide, target, reduction="none")
    losses = (
        F.linear_cross_entropy(
            x, w, target, linear_bias=bias, reduction="none", split_invariant=split_invariant
        ),
        TF.cross_entropy(TF.linear(x, w, bias), target, reduction="none"),
    )
    mine, theirs = ((loss - exact).norm() for loss in losses)
    assert mine <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_of_class_probabilities_has_the_bits_of_every_nan(dtype: torch.dtype) -> None:
    """torch's loops write another one, with a sign or other digits, where they are vectors."""
    x = torch.zeros(4, 20, dtype=dtype)
    x[0, 3] = torch.nan
    _, (_, grad) = mbkern.loss_and_grad(
        "cross_entropy", x, torch.full_like(x, 0.05), argnums=(0, 1)
    )
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    found = grad.view(integers)[grad.isnan()]
    assert found.numel() > 0
    assert (found == torch.full((), torch.nan, dtype=dtype).view(integers)).all()
