"""16-bit gradients are formed in forward on the guess that the incoming gradient is 1: a matter of
time and memory, never of bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CASES, Case
from torch import Tensor

import mbkern.autograd
import mbkern.functional as F

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
GUESS = mbkern.autograd._Incoming
INCOMING = (1.0, 0.3, -64.0, float("inf"))


@pytest.fixture(autouse=True)
def guess() -> Iterator[None]:
    before = GUESS.was_one
    yield
    GUESS.was_one = before


def _gradients(
    case: Case, dtype: torch.dtype, factor: float, reduction: str, one: bool
) -> list[Tensor]:
    GUESS.was_one = one
    sample, leaves = case.leaves(case.sample((6, 70), dtype))
    loss = case.function(
        sample.input, sample.target, **sample.options, reduction=reduction, loss_dtype=torch.float32
    )
    loss.backward(torch.tensor(factor))
    assert GUESS.was_one is (factor == 1.0)
    return [g for leaf in leaves.values() if (g := leaf.grad) is not None]


@every_case
@every_type
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_right_and_wrong_guesses_give_the_same_bits(
    case: Case, dtype: torch.dtype, reduction: str
) -> None:
    for factor in INCOMING:
        right, wrong = (_gradients(case, dtype, factor, reduction, one) for one in (True, False))
        assert len(right) == len(wrong) > 0
        for a, b in zip(right, wrong, strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16)), factor


def _logits() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(7, 33, generator=random).bfloat16().requires_grad_()
    return x, torch.randint(0, 33, (7,), generator=random)


def test_the_gradient_of_a_right_guess_is_handed_out() -> None:
    """.grad is what forward wrote, unless the graph is kept."""
    x, target = _logits()
    loss = F.cross_entropy(x, target)
    formed = loss.grad_fn.left.grads[0]  # type: ignore[union-attr]
    address = formed.data_ptr()
    del formed
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert first is not None
    assert x.grad is not None
    assert first.data_ptr() != address
    assert x.grad.data_ptr() == address
    assert torch.equal(first, x.grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("order", [(1.0, 0.5, 1.0), (0.5, 1.0, 0.5)])
def test_a_graph_that_is_kept_takes_any(order: tuple[float, ...]) -> None:
    x, target = _logits()
    loss = F.cross_entropy(x, target, loss_dtype=torch.float32)
    for factor in order:
        incoming = torch.tensor(factor)
        (got,) = torch.autograd.grad(loss, x, incoming, retain_graph=True)
        want = mbkern.loss_and_grad("cross_entropy", x.detach(), target, scale=factor)[1]
        assert torch.equal(got, want)
    (many,) = torch.autograd.grad(
        loss, x, torch.tensor(order), retain_graph=True, is_grads_batched=True
    )
    for got, factor in zip(many, order, strict=True):
        want = mbkern.loss_and_grad("cross_entropy", x.detach(), target, scale=factor)[1]
        assert torch.equal(got, want)


def test_a_wrong_guess_takes_the_divisor_of_forward() -> None:
    for name in ("cross_entropy", "mse_loss"):
        x, target = _logits()
        other = target if name == "cross_entropy" else torch.zeros_like(x)
        denominator = torch.tensor(9.0)
        loss = getattr(F, name)(x, other, denominator=denominator)
        denominator.fill_(100.0)
        loss.backward(torch.tensor(2.0, dtype=loss.dtype))
        want = mbkern.loss_and_grad(name, x.detach(), other, denominator=9.0, scale=2.0)[1]
        assert torch.equal(x.grad, want)


def test_a_wrong_guess_reads_no_changed_input() -> None:
    x, target = _logits()
    y = x * 1
    loss = F.cross_entropy(y, target)
    y.detach().mul_(2)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(torch.tensor(2.0, dtype=loss.dtype))


def test_nothing_is_guessed_where_there_is_no_second_try() -> None:
    x, target = _logits()
    loss = F.cross_entropy(x * 1, target, inplace=True)
    assert loss.grad_fn.left.grads is None  # type: ignore[union-attr]
    assert F.cross_entropy(x, target, reduction="none").grad_fn.left.grads is None  # type: ignore[union-attr]
