"""The fused head says by name what it cannot take, in every way it is called in, and before that
nothing has changed; and what it takes, it takes in every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import check
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mbkern
from mbkern import functional as F

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
head = F.linear_cross_entropy


def tensors() -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    return {
        "input": torch.randn(6, 5, generator=g).requires_grad_(),
        "linear_weight": torch.randn(4, 5, generator=g).requires_grad_(),
        "target": torch.randint(4, (6,), generator=g),
    }


def plain(t: dict[str, Any]) -> None:
    head(**t)


def operators(t: dict[str, Any]) -> None:
    with FlopCounterMode(display=False):
        head(**t)


def transform(t: dict[str, Any]) -> None:
    x = t.pop("input")
    torch.func.grad(lambda x: head(x, **t))(x)


def imperative(t: dict[str, Any]) -> None:
    buffer, total = torch.zeros(4, 5), mbkern.LossSum()
    t = {k: v.detach() if isinstance(v, Tensor) and v.requires_grad else v for k, v in t.items()}
    try:
        mbkern.loss_and_grad(
            "linear_cross_entropy", argnums="linear_weight", grad_out=buffer, accumulate=True,
            loss_sum=total, **t,
        )  # fmt: skip
    finally:
        assert not buffer.any()
        assert total.value() == 0


EVERY: tuple[Callable[[dict[str, Any]], None], ...] = (plain, operators, transform, imperative)
NESTED = object()
META = {"device": "meta"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("target", None, TypeError, "target must be a tensor, not NoneType"),
        ("target", NESTED, TypeError, "target has layout nested"),
        ("linear_bias", NESTED, TypeError, "linear_bias has layout nested"),
        ("denominator", NESTED, TypeError, "denominator has layout nested"),
        # An operator of which one tensor is on the meta device gave memory as it was found.
        ("weight", torch.ones(4, **META), ValueError, "weight is on meta"),
        ("sample_weight", torch.ones(6, **META), ValueError, "sample_weight is on meta"),
        ("denominator", torch.ones((), **META), ValueError, "denominator is on meta"),
        ("logit_scale", torch.ones((), **META), ValueError, "logit_scale is on meta"),
        ("denominator", "6", TypeError, "denominator must be a number or a 0-dim tensor, not str"),
        ("ignore_index", 2**70, ValueError, "ignore_index must have 64 bits"),
        ("split_invariant", "False", TypeError, "split_invariant must be True or False, not str"),
        ("split_invariant", torch.ones(2), TypeError, "split_invariant must be True or False"),
        ("sample_weight", torch.ones(5), ValueError, r"sample_weight has shape \(5,\)"),
    ],
)
@pytest.mark.parametrize("way", EVERY)
def test_every_way(way: Any, name: str, value: Any, kind: type[Exception], message: str) -> None:
    if value is NESTED:
        value = torch.nested.nested_tensor([torch.ones(3), torch.ones(3)])
    with pytest.raises(kind, match=f"mbkern: .*{message}"):
        way(tensors() | {name: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"return_stats": "no"}, "return_stats must be True or False, not str"),
        ({"return_stats": torch.ones(2)}, "return_stats must be True or False, not Tensor"),
        ({"grad_scale": "1"}, "grad_scale must be a number"),
        ({"filter_eps": torch.ones(2).numpy()}, "filter_eps must be a number"),
    ],
)
@pytest.mark.parametrize("way", [plain, operators, transform])
def test_without_a_counterpart(way: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        way(tensors() | wrong)


def test_a_hint_on_another_device() -> None:
    with pytest.raises(ValueError, match="grad_scale is on meta"):
        transform(tensors() | {"grad_scale": torch.ones((), **META)})


def test_an_array_to_accumulate_into() -> None:
    with pytest.raises(TypeError, match=r"accumulate_into is a tensor.*not ndarray"):
        plain(tensors() | {"accumulate_into": torch.zeros(4, 5).numpy()})


def test_operands_of_two_dtypes_in_the_formula() -> None:
    t = tensors()
    t["linear_weight"] = t["linear_weight"].detach().double()
    with pytest.raises(
        TypeError, match=r"input is torch.float32 and linear_weight is torch.float64"
    ):
        transform(t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_over_when_its_gradients_are_differentiated(dtype: torch.dtype) -> None:
    """Hidden states of 16 bits and a float32 weight, as autocast makes them: second derivatives,
    and many incoming gradients at once."""
    t = tensors()
    x, w = t["input"].detach().to(dtype).requires_grad_(), t["linear_weight"]
    with torch.autocast("cpu", dtype):
        loss = head(x, w, t["target"])
        wide = F.cross_entropy(torch.nn.functional.linear(x, w), t["target"])
    want = torch.autograd.grad(loss, [x, w], retain_graph=True)
    with torch.autocast("cpu", dtype):
        loss, again = head(x, w, t["target"]), head(x, w, t["target"])
    got = torch.autograd.grad(loss, [x, w], create_graph=True)
    both = torch.stack([torch.ones(()), torch.tensor(-2.0)])
    many = torch.autograd.grad(again, [x, w], both, is_grads_batched=True)
    for grad, two, expected in zip(got, many, want, strict=True):
        assert grad.dtype is two.dtype is expected.dtype
        check(grad, expected, "create_graph", 2e-2)
        check(two[0], expected, "batched", 2e-2)
        check(two[1], -2 * expected, "batched", 2e-2)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in got), [x, w])
    first = torch.autograd.grad(wide, [x, w], create_graph=True)
    wanted = torch.autograd.grad(sum(g.float().square().sum() for g in first), [x, w])
    for grad, expected in zip(second, wanted, strict=True):
        check(grad, expected, "second", 5e-2)


@pytest.mark.parametrize("more", [{}, {"reduction": "none"}, {"logit_scale": torch.tensor(1.5)}])
def test_a_backward_under_autocast_rounds_nothing(more: dict[str, Any]) -> None:
    """The head was called in float32; its rows that are ignored, or a scale, make no difference."""
    t = tensors() | more
    t["target"][1] = -100
    x, w = t["input"], t["linear_weight"]
    for name, create in (("input", False), ("input", True), ("linear_weight", True)):
        if more.get("logit_scale") is not None:
            t["logit_scale"] = more["logit_scale"].clone().requires_grad_()
        (want,) = torch.autograd.grad(head(**t).sum(), t[name])
        loss = head(**t, accumulate_into=None if create else torch.zeros(4, 5)).sum()
        with torch.autocast("cpu", torch.bfloat16):
            (got,) = torch.autograd.grad(loss, t[name], create_graph=create)
        check(got, want, (name, create), 1e-6)
    assert x.grad is w.grad is None


def test_probabilities_of_float64_in_the_formula() -> None:
    """All is computed in float64 then, as in the kernels."""
    t = tensors()
    x, w = t["input"].detach().bfloat16(), t["linear_weight"].detach().bfloat16()
    shares = torch.full((6, 4), 0.25, dtype=torch.float64)
    want, statistics = head(x, w, shares, return_stats=True)
    with FlopCounterMode(display=False):
        got, others = head(x, w, shares, return_stats=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert others.lse.dtype is statistics.lse.dtype is torch.float64
    grad = torch.func.grad(lambda x: head(x, w, shares))(x)
    check(grad, torch.autograd.grad(head(x.requires_grad_(), w, shares), x)[0], "grad", 4e-3)


class Marked(Tensor):
    """A subclass that changes nothing."""


def test_weights_that_are_subclasses() -> None:
    t, g = tensors(), torch.Generator().manual_seed(6)
    more = {
        "weight": torch.rand(4, generator=g),
        "sample_weight": torch.rand(6, generator=g),
        "denominator": torch.tensor(4.0),
    }
    want = head(**t, **more)
    for name, value in more.items():
        got = head(**t, **(more | {name: value.as_subclass(Marked)}))
        torch.testing.assert_close(torch.Tensor(got.detach()), want.detach())


def test_another_default_dtype() -> None:
    """Statistics have the dtypes that are promised."""
    want = head(**tensors(), return_stats=True)[1]
    torch.set_default_dtype(torch.float64)
    try:
        got = head(**{k: v.float() if k != "target" else v for k, v in tensors().items()},
                   return_stats=True)[1]  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    assert want.accuracy.dtype is got.accuracy.dtype is torch.float32
    assert [s.dtype for s in want] == [s.dtype for s in got]
