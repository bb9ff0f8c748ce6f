"""Hints of the incoming gradient, and gradients of few bits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import ARITHMETIC, CASES, DTYPES, REDUCTIONS, Case, check, spacing

import mbkern

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
HALF = (torch.bfloat16, torch.float16)


@every_case
def test_right_hints_change_no_bit(case: Case) -> None:
    """The factor is applied in fp32 before the rounding, in forward or in backward."""
    for dtype, reduction in itertools.product(HALF, REDUCTIONS):
        for factor in (1.0, 3.0, -0.3, 1024.0):
            incoming = torch.tensor(factor)
            x, target = case.leaf(dtype)
            plain = case.function(x, target, reduction=reduction, loss_dtype=torch.float32)
            want = torch.autograd.grad(plain, x, incoming.expand_as(plain))[0]
            for hint in (incoming.item(), incoming, incoming.double()):
                loss = case.function(
                    x, target, reduction=reduction, loss_dtype=torch.float32, grad_scale=hint
                )
                got = torch.autograd.grad(loss, x, incoming.expand_as(loss))[0]
                assert torch.equal(loss, plain), (dtype, reduction, hint)
                assert torch.equal(got, want), (dtype, reduction, hint)


@every_case
def test_wrong_hints_cost_one_rounding(case: Case) -> None:
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        info = torch.finfo(dtype)
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        for hint, factor in itertools.product((4.0, torch.tensor(0.7), -3), (1.0, 0.3, -5.0)):
            x, target = case.leaf(dtype)
            loss = case.function(x, target, reduction=reduction, grad_scale=hint)
            assert torch.equal(loss, case.function(x, target, reduction=reduction))
            incoming = torch.full_like(loss, factor)
            got = torch.autograd.grad(loss, x, incoming)[0].double()
            reference, wide = case.exact(x, target, reduction=reduction)
            want = torch.autograd.grad(reference, wide, incoming.double())[0]
            # Two roundings to dtype; an underflow of the first is as large as factor / hint.
            underflow = max(abs(factor / float(hint)), 1) * info.tiny * info.eps
            bound = 0.5 * (spacing(want, dtype) + 1.01 * info.eps * want.abs() + underflow)
            bound += 2 * ARITHMETIC[compute] * torch.finfo(compute).eps * want.abs().max()
            label = f"{case.name} {dtype} {reduction} hint {hint}, factor {factor}"
            assert ((got - want).abs() <= bound).all(), label


@every_case
def test_a_hint_is_read_once(case: Case) -> None:
    """GradScaler changes its scale in place; a hint that changes after forward changes nothing."""
    for dtype in (torch.float32, torch.float16):
        x, target = case.leaf(dtype)
        want = torch.autograd.grad(case.function(x, target, loss_dtype=torch.float32) * 8, x)[0]
        hint = torch.tensor(8.0)
        loss = case.function(x, target, loss_dtype=torch.float32, grad_scale=hint)
        hint.mul_(2)
        assert torch.equal(torch.autograd.grad(loss * 8, x)[0], want), dtype


@every_case
def test_hints_that_cannot_be_undone(case: Case) -> None:
    """A gradient times 0, infinity or NaN is lost: such a hint is refused, or not used."""
    for dtype, hint in itertools.product((torch.float32, torch.bfloat16), (0.0, "inf", "nan")):
        x, target = case.leaf(dtype)
        (want,) = torch.autograd.grad(case.function(x, target), x)
        try:
            loss = case.function(x, target, grad_scale=float(hint))
        except ValueError as error:
            assert "grad_scale" in str(error)  # noqa: PT017 - one of two ways that are right
            continue
        (got,) = torch.autograd.grad(loss, x)
        assert torch.equal(got, want), f"{dtype}, hint {hint}"


def test_grad_scaler() -> None:
    """fp16, 32000 classes, scale 65536: error at most torch's, and only what must underflows."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(512, 32000, generator=random).mul_(4).half().requires_grad_()
    target = torch.randint(32000, (512,), generator=random)
    scale = torch.tensor(65536.0)
    grads = {}
    for name, function, options in (
        ("torch", F.cross_entropy, {}),
        ("mbkern", mbkern.functional.cross_entropy, {}),
        ("hint", mbkern.functional.cross_entropy, {"grad_scale": scale}),
    ):
        with torch.autocast("cpu", torch.float16):
            loss = function(logits, target, **options)
        assert loss.dtype is torch.float32
        (grads[name],) = torch.autograd.grad(loss * scale, logits)
    assert torch.equal(grads["mbkern"], grads["hint"])
    want = logits.detach().double().softmax(1)
    want[torch.arange(512), target] -= 1
    want *= 65536 / 512
    for rows in range(0, 512, 128):  # some of the rows, for the time that it takes
        block = slice(rows, rows + 16)
        check(grads["mbkern"][block], want[block], grads["torch"][block], f"rows from {rows}")
    # Half the smallest denormal is the largest number that rounds to 0.
    nothing = want.abs() <= 2.0**-25
    lost = grads["mbkern"] == 0
    assert 0 < nothing.double().mean() < 0.25, "the test is about small gradients"
    assert not (lost & (want.abs() > 2.0**-25 * (1 + 1e-5))).any()  # fp32 arithmetic
    (unscaled,) = torch.autograd.grad(mbkern.functional.cross_entropy(logits, target), logits)
    assert (unscaled == 0).double().mean() > 0.5, "without the scale most of it is lost"


def test_confident_logits() -> None:
    """No cancellation as p -> 1: loss log1p(R), gradient -R / (1 + R), R = sum of the others' exp.

    Bound of the relative error: the distances, up to 44, are rounded to fp32 (2^-24 * 32 = 1.9e-6),
    exp and the sums add a few eps: 3e-6 (for long rows, R is a sum of rounded terms of one sign).
    """
    random = torch.Generator().manual_seed(2)
    for columns in (2, 5, 40, 100, 1000, 5000):
        margins = torch.linspace(0, 40, 81)
        x = torch.randn(len(margins), columns, generator=random)
        target = torch.randint(columns, (len(margins),), generator=random)
        rows = torch.arange(len(margins))
        x[rows, target] = x.max(1).values + margins
        x.requires_grad_()
        loss = mbkern.functional.cross_entropy(x, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        distance = x.detach().double() - x.detach().double()[rows, target].unsqueeze(1)
        terms = distance.exp()
        terms[rows, target] = 0
        rest = terms.sum(1)
        for name, got, want in (
            ("loss", loss.detach(), torch.log1p(rest)),
            ("gradient", grad[rows, target], -rest / (1 + rest)),
        ):
            error = ((got.double() - want) / want).abs()
            where = f"{columns} classes, margin {margins[error.argmax()]}: {name}"
            assert error.max() <= 3e-6, f"{where} {error.max()}"
