"""Derivatives inside mbkern.patched(), and of losses whose arguments depend on each other."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from patched_inputs import every_way
from torch import Tensor

import mbkern
from mbkern._patched import patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread", "patches_taken_back")

ELEMENTS = [case for case in CASES if case.torch and case.name not in ("cross_entropy", "nll_loss")]
#: Those whose formula once was torch's function, which came back to ours.
FORMULAS = (
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "kl_div",
    "poisson_nll_loss", "smooth_l1_loss",
)  # fmt: skip
torch.manual_seed(0)
P = torch.rand(4, 5, dtype=torch.float64) * 0.8 + 0.1


def first_and_second(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """A gradient with and without a graph, and that of its squares."""
    leaf = P.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    second = torch.zeros_like(leaf)
    if grad.requires_grad:  # not that of kl_div by its input
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    (alone,) = torch.autograd.grad(function(leaf), leaf)
    return [grad.detach(), second, alone]


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")  # of kl_div
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_do_not_come_back(name: str) -> None:
    """A call is one call: with create_graph, in forward mode, process-wide, in another thread."""

    def function(x: Tensor) -> Tensor:
        result: Tensor = getattr(F, name)(x, P * 0.5)
        return result

    want = first_and_second(function)
    _, slope = torch.func.jvp(function, (P,), (P,))
    with patched(report=True) as report:
        got = first_and_second(function)
        assert report.taken == {name: 2}
        torch.testing.assert_close(torch.func.jvp(function, (P,), (P,))[1], slope)
        assert report.taken == {name: 3}
        with torch.device("cpu"):  # a mode, which is asked by torch's functions
            torch.testing.assert_close(torch.func.jvp(function, (P,), (P,))[1], slope)
    torch.testing.assert_close(got, want)
    patch()
    try:
        thread = threading.Thread(target=lambda: got.extend(first_and_second(function)))
        thread.start()
        thread.join()
    finally:
        unpatch()
    torch.testing.assert_close(got[3:], want)


DEPENDENT: dict[str, Callable[[Callable[..., Tensor], Tensor], Tensor]] = {
    "one tensor twice": lambda f, p: f(p, p),
    "target of the leaf": lambda f, p: f(p, p * 0.5),
    "target of the input": lambda f, p: f(q := p * 1, q * q),
    "input of the target": lambda f, p: f((q := p * 1) * q, q),
}


@every_way
@pytest.mark.parametrize("how", DEPENDENT)
@pytest.mark.parametrize("name", ["binary_cross_entropy", "mse_loss", "cross_entropy", "kl_div"])
@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
def test_arguments_that_depend_on_each_other(name: str, how: str, mode: bool) -> None:
    """With a graph wanted, each argument's own derivative: autograd adds them up."""

    def function(p: Tensor) -> Tensor:
        return DEPENDENT[how](getattr(F, name), p)

    want = first_and_second(function)
    torch.testing.assert_close(want[0], want[2])
    with patched(mode=mode, report=True) as report:
        got = first_and_second(function)
    assert report.taken == {name: 2}
    torch.testing.assert_close(got, want)


def test_tied_weights_of_the_head() -> None:
    """The weight that embeds, too."""
    tokens = torch.tensor([3, 1, 2, 0, 3, 1])

    def function(head: Callable[..., Tensor], w: Tensor) -> Tensor:
        return head(torch.tanh(w[tokens]), w, tokens.roll(1))

    def unfused(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.t(), t)

    want = first_and_second(lambda w: function(unfused, w))
    got = first_and_second(lambda w: function(mbkern.functional.linear_cross_entropy, w))
    torch.testing.assert_close(got, want)
    results = []
    for head in (unfused, mbkern.functional.linear_cross_entropy):
        leaf = P.clone().requires_grad_()
        incoming = torch.tensor([1.0, -2.0], dtype=torch.float64)
        loss = function(head, leaf)
        results.append(torch.autograd.grad(loss, leaf, incoming, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.parametrize("case", ELEMENTS, ids=lambda case: case.name)
def test_transforms_of_every_loss(case: Case) -> None:
    """Forward mode inside the block, where formulas stand in for kernels."""
    variation = next(v for v in case.variations if v.torch)
    sample = case.sample((4, 5), torch.float64, variation)
    tensors = case.tensors(sample)
    names = [n for n in case.arguments if n in tensors]
    options = {n: v for n, v in sample.options.items() if n not in tensors}
    options["reduction"] = "sum"
    x, *rest = (tensors[n] for n in names if n != "pos_weight")

    def function(x: Tensor) -> Tensor:
        result: Tensor = getattr(F, case.name)(x, *rest, **options)
        return result

    want = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with patched(report=True) as report:
        got = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    assert report.taken == {case.name: 1}, str(report)
    torch.testing.assert_close(got, want)
