"""16-bit gradients are formed in forward on the guess that the incoming gradient is 1: a matter of
time and memory, never of bits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, Case
from torch import Tensor
from torch.utils import checkpoint

import mbkern
import mbkern.functional as F
from mbkern import _autograd_left

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
GUESS = _autograd_left.Incoming
INCOMING = (1.0, 0.3, -64.0, float("inf"))


@pytest.fixture(autouse=True)
def guess() -> Iterator[None]:
    before, GUESS.was_one = GUESS.was_one, True
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


def test_what_is_saved_does_not_depend_on_the_guess() -> None:
    """A checkpoint pairs what it saved with what the second forward saves, by number."""
    x, target = _logits()
    z = torch.randn(2, 7, requires_grad=True)

    def two(x: Tensor) -> Tensor:
        return F.cross_entropy(x * 1, target) + F.cross_entropy(x * 2, target)

    def beside(x: Tensor, z: Tensor) -> Tensor:
        return F.cross_entropy(x * 1, target).float() + (z * 1).sin().sum()

    (want,) = torch.autograd.grad(two(x) * 0.5, x)
    for early in (True, False):
        with checkpoint.set_checkpoint_early_stop(early):
            for _ in range(2):
                GUESS.was_one = True
                inside = checkpoint.checkpoint(two, x, use_reentrant=False)
                (got,) = torch.autograd.grad(inside * 0.5, x)
                assert torch.equal(got, want)
            GUESS.was_one = True
            one, other = checkpoint.checkpoint(beside, x, z, use_reentrant=False), two(x)
            (of_z,) = torch.autograd.grad(one + 0.5 * other, z)
            assert torch.equal(of_z, z.detach().cos())


def test_hooks_of_saved_tensors_are_not_passed_by() -> None:
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("NOT CHECKED: this torch does not tell of hooks")
    x, target = _logits()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        losses = F.cross_entropy(x, target), F.mse_loss(x, torch.zeros_like(x))
    assert all(loss.grad_fn.left.grads is None for loss in losses)  # type: ignore[union-attr]


def test_nothing_is_kept_for_a_second_derivative() -> None:
    for loss in (F.cross_entropy(*_logits()), F.mse_loss(_logits()[0], torch.zeros(7, 33))):
        node = loss.grad_fn
        torch.autograd.grad(loss, node.next_functions[0][0].variable, create_graph=True)  # type: ignore[union-attr]
        assert node.left.grads is None  # type: ignore[union-attr]


def test_threads_may_share_a_graph() -> None:
    x, target = _logits()
    wanted = {
        factor: mbkern.loss_and_grad("cross_entropy", x.detach(), target, scale=factor)[1]
        for factor in (1.0, 2.0)
    }
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            GUESS.was_one = True
            loss = F.cross_entropy(x, target)

            def right(factor: float, loss: Tensor = loss) -> bool:
                incoming = torch.tensor(factor, dtype=loss.dtype)
                (got,) = torch.autograd.grad(loss, x, incoming, retain_graph=True)
                return torch.equal(got, wanted[factor])

            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(right, (1.0, 2.0, 1.0, 2.0)))
    finally:
        sys.setswitchinterval(before)


def test_nothing_is_guessed_where_there_is_no_second_try() -> None:
    x, target = _logits()
    loss = F.cross_entropy(x * 1, target, inplace=True)
    assert loss.grad_fn.left.grads is None  # type: ignore[union-attr]
    assert F.cross_entropy(x, target, reduction="none").grad_fn.left.grads is None  # type: ignore[union-attr]
