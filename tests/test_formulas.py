"""The formulas that take a kernel's place (second derivatives, forward mode, tracers) agree with it
also where exponentials overflow and logarithms are infinite."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import mbkern.functional as F

pytestmark = pytest.mark.usefixtures("one_thread")
LossFunction = Callable[[Tensor, Tensor], Tensor]
INF = math.inf
SCORES = (0.0, 0.5, -0.5, 2.0, 30.0, -30.0, 100.0, -100.0, 1e4, -1e4)
SHARES = (0.0, 1e-30, 0.25, 0.5, 1.0 - 2**-24, 1.0)
SIGNS = (-1.0, 1.0)


def _agree(f: LossFunction, x: Tensor, y: Tensor, *, of_second: bool) -> None:
    """The formula's loss, gradient and second derivative beside the kernel's."""
    tensors = tuple(t.detach().requires_grad_() for t in ((x, y) if of_second else (x,)))

    def of(*given: Tensor) -> Tensor:
        return f(given[0], given[1] if of_second else y)

    value = of(*tensors)
    incoming = torch.ones_like(value)
    plain = torch.autograd.grad(value, tensors, incoming)
    by_formula = torch.autograd.grad(of(*tensors), tensors, incoming, create_graph=True)
    tangents = tuple(torch.ones_like(t) for t in tensors)
    pushed, _ = torch.func.jvp(of, tuple(t.detach() for t in tensors), tangents)
    near = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(pushed, value.detach(), **near)
    for mine, kernel in zip(by_formula, plain, strict=True):
        torch.testing.assert_close(mine.detach(), kernel, **near)
    second = torch.autograd.grad(sum(g.sum() for g in by_formula), tensors, allow_unused=True)
    for derivative in second:
        assert derivative is None or derivative.isfinite().all()


def _pairs(xs: tuple[float, ...], ys: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(list(itertools.product(xs, ys)), dtype=torch.float64)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


ELEMENTS: dict[str, tuple[LossFunction, tuple[float, ...], tuple[float, ...], bool]] = {
    "soft_margin": (lambda x, y: F.soft_margin_loss(x, y, reduction="none"), SCORES, SIGNS, False),
    "log_cosh": (lambda x, y: F.log_cosh_loss(x, y, reduction="none"), SCORES, (0.0, 3.0), True),
    "focal": (lambda x, y: F.sigmoid_focal_loss(x, y), SCORES, (0.0, 0.25, 1.0), False),
    "multilabel_soft_margin": (
        lambda x, y: F.multilabel_soft_margin_loss(x[:, None], y[:, None], reduction="none"),
        SCORES, (0.0, 0.25, 1.0), True,
    ),
    "poisson": (
        lambda x, y: F.poisson_nll_loss(x, y, full=True, reduction="none"),
        (0.0, -2.0, 3.0), (0.0, 1.0, 2.0, 9.0), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTS)
def test_ends_of_the_numbers(name: str) -> None:
    f, xs, ys, of_second = ELEMENTS[name]
    _agree(f, *_pairs(xs, ys), of_second=of_second)


def test_probabilities_of_0_and_1() -> None:
    """The derivative by the target is that of the loss, at most 100."""
    x, y = _pairs(SHARES, (0.0, 0.5, 1.0))
    target = y.requires_grad_()

    def value() -> Tensor:
        return F.binary_cross_entropy(x, target, reduction="sum")

    (plain,) = torch.autograd.grad(value(), target)
    (by_formula,) = torch.autograd.grad(value(), target, create_graph=True)
    torch.testing.assert_close(by_formula.detach(), plain)
    assert by_formula.abs().max() == 100.0
    inner = torch.full((3,), 0.25, dtype=torch.float64, requires_grad=True)
    of_target = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda p, t: F.binary_cross_entropy(p, t * 0.5 + 0.25, reduction="none"), (inner, of_target)
    )


DISTANCES: dict[str, LossFunction] = {
    "kl": lambda x, y: F.kl_div_with_logits(x, y, reduction="none"),
    "reverse_kl": lambda x, y: F.kl_div_with_logits(x, y, direction="reverse", reduction="none"),
    "js": lambda x, y: F.js_div_with_logits(x, y, reduction="none"),
    "js_low": lambda x, y: F.js_div_with_logits(x, y, beta=0.1, reduction="none"),
    "js_of_the_student": lambda x, y: F.js_div_with_logits(x, y, beta=0.0, reduction="none"),
    "js_of_the_teacher": lambda x, y: F.js_div_with_logits(x, y, beta=1.0, reduction="none"),
    "tv": lambda x, y: F.tv_distance_with_logits(x, y, reduction="none"),
    "entropy": lambda x, y: F.entropy_with_logits(x, reduction="none"),
}


@pytest.mark.parametrize("masked", [-200.0, -1e4, -INF])
@pytest.mark.parametrize("name", DISTANCES)
def test_masked_classes(name: str, masked: float) -> None:
    """A vocabulary of which a part is masked, by both or by one of them."""
    f = DISTANCES[name]
    student = torch.tensor([[0.5, -1.0, masked, 2.0], [1.0, 0.25, 0.5, masked]]).double()
    teacher = torch.tensor([[1.5, 0.0, masked, -1.0], [masked, 0.0, 1.0, masked]]).double()
    if name == "reverse_kl":  # finite where only what does not count is masked
        student, teacher = teacher, student
    _agree(f, student, teacher, of_second=name != "entropy")


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_classes_that_are_certain(gamma: float) -> None:
    x = torch.tensor([[0.0, -1e4, -INF], [0.0, -1e4, -1e4], [2.0, 1.0, 0.0]]).double()
    y = torch.tensor([0, 0, 1])

    def f(x: Tensor, y: Tensor) -> Tensor:
        return F.softmax_focal_loss(x, y, gamma=gamma, reduction="none")

    _agree(f, x, y, of_second=False)
    one = torch.zeros(2, 1, dtype=torch.float64)
    _agree(f, one, torch.zeros(2, dtype=torch.long), of_second=False)


def test_a_negated_view_in_forward_mode() -> None:
    x, t, d = torch.randn(4, 7), torch.arange(4), torch.randn(4, 7)
    _, want = torch.func.jvp(lambda x: F.cross_entropy(x, t), (-x,), (d,))
    _, got = torch.func.jvp(lambda x: F.cross_entropy(x, t), (torch._neg_view(x),), (d,))
    torch.testing.assert_close(got, want)


def test_a_traced_smoothing_in_double_precision() -> None:
    """TorchScript's tracer makes a tensor of the number of classes, of float32 beside a number."""
    x, t = torch.randn(3, 130, dtype=torch.float64), torch.arange(3)

    def smoothed(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t, label_smoothing=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(smoothed, (x, t), check_trace=False)
    torch.testing.assert_close(graph(x, t), smoothed(x, t), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tangents_have_the_dtype_of_the_result(dtype: torch.dtype) -> None:
    """Also where the loss of an item has no dimensions, whose tangent torch makes double."""
    losses: list[Callable[..., Tensor]] = [
        lambda x, y, z: F.triplet_margin_loss(x, y, z, margin=3.0),
        lambda x, y, z: F.triplet_margin_loss(x, y, z, margin=3.0, reduction="none"),
        lambda x, y, z: F.cosine_embedding_loss(x, y, torch.tensor(1)),
        lambda x, y, z: F.kl_div(x, y, reduction="batchmean"),
        lambda x, y, z: F.mse_loss(x, y, denominator=7.0),
    ]
    x, y, z = torch.rand(3, 5).to(dtype)
    for loss in losses:
        value, tangent = torch.func.jvp(partial(loss, y=y, z=z), (x,), (torch.ones_like(x),))
        assert tangent.dtype is value.dtype is dtype
        wide, step = [t.double() for t in (x, y, z)], 1e-5
        above, below = (loss(wide[0] + s, *wide[1:]) for s in (step, -step))
        assert abs(tangent.double() - (above - below) / (2 * step)) < 2e-2


def test_a_negated_view_beside_what_is_expanded_has_a_tangent() -> None:
    x, y = torch._neg_view(torch.rand(1, 6)), torch.rand(1)

    def loss(x: Tensor) -> Tensor:
        return F.gaussian_nll_loss(x, y.expand(1, 6), 2.0)

    plain = x.resolve_neg().requires_grad_()
    loss(plain).backward()
    torch.testing.assert_close(torch.func.jacfwd(loss)(x), plain.grad)
