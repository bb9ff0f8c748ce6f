"""What a plan leaves behind: gradients, random numbers, pictures' backends; and what it refuses."""

from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mbkern
from mbkern._plan_measure import leaves

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def plan(step: Any, sample: Any = None, **options: Any) -> Any:
    sample = torch.ones(4, 4) if sample is None else sample
    return mbkern.plan(step, sample, **{"batch_size": 4, "seconds": 0.02, **options})


class Refusing(torch.autograd.Function):
    """Whose backward refuses one item alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.items = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if ctx.items < 2:
            raise RuntimeError("alone")
        return grad


class Variable(torch.autograd.Function):
    """With an attribute of the name that leaves' nodes have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = "mine"
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def large_only(a: nn.Linear, b: nn.Linear, x: Tensor) -> Tensor:
    """As a model that routes its items: one part is used by large micro-batches only."""
    return a(x).sum() + (b(x).sum() if len(x) > 2 else 0.0)


def at_times(a: nn.Linear, b: nn.Linear, x: Tensor) -> Tensor:
    """As with layers that are dropped by chance."""
    return a(x).sum() + (b(x).sum() if random.random() < 0.2 else 0.0)


def refused_in_backward(a: nn.Linear, b: nn.Linear, x: Tensor) -> Tensor:
    return (Refusing.apply(a(x)) + b(x)).sum()


def refused_without_grad(a: nn.Linear, b: nn.Linear, x: Tensor) -> Tensor:
    if len(x) < 2 and not torch.is_grad_enabled():
        raise ValueError("alone")
    return (a(x) + b(x)).sum()


def with_a_variable(a: nn.Linear, b: nn.Linear, x: Tensor) -> Tensor:
    return (Variable.apply(a(x)) + b(x)).sum()


def failing(a: nn.Linear, b: nn.Linear, x: Tensor) -> Tensor:
    if len(x) == 4:
        raise KeyError("four")
    return (a(x) + b(x)).sum()


@pytest.mark.parametrize(
    "step",
    [large_only, at_times, refused_in_backward, refused_without_grad, with_a_variable, failing],
)
def test_gradients_are_put_back(step: Any) -> None:
    """Of all passes' parameters: those of the first pass only were, and not if it was refused."""
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    a.weight.grad, b.bias.grad = torch.ones(3, 4), torch.ones(3)
    kept = a.weight.grad, b.bias.grad
    try:
        plan(lambda x: step(a, b, x))
    except KeyError:
        assert step is failing
    assert a.weight.grad is kept[0]
    assert b.bias.grad is kept[1]
    assert bool((kept[0] == 1).all() & (kept[1] == 1).all())
    assert a.bias.grad is b.weight.grad is None


def test_leaves_are_of_torchs_nodes() -> None:
    x = torch.ones(2, requires_grad=True)
    (found,) = leaves(Variable.apply(x).sum())
    assert found is x


def test_random_numbers_of_all_three_are_put_back() -> None:
    weight = torch.ones(4, requires_grad=True)

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)

    seed()
    wanted = draw()
    seed()
    plan(lambda x: (weight * x).sum() * sum(draw()), lambda n: torch.ones(n, 4) * sum(draw()))
    assert draw() == wanted


def popping(batch: Any) -> Tensor:
    return (batch.pop("x") * batch.pop("list")[0].pop()).sum()


def test_a_step_may_take_its_batch_apart() -> None:
    """As ``labels = batch.pop("labels")`` does: the next pass had none."""
    weight = torch.ones(4, requires_grad=True)
    batch = {"x": torch.ones(4, 4), "list": [[torch.ones(4, 4), torch.ones(4, 4)]]}
    assert plan(lambda b: (weight * popping(b)).sum(), batch).micro_batch >= 1
    assert [*batch] == ["x", "list"]

    def sample(n: int) -> Any:
        return {"x": torch.ones(n, 4), "list": [[torch.ones(n, 4)]]}

    assert plan(lambda b: (weight * popping(b)).sum(), sample).micro_batch >= 1


def test_a_sample_that_one_pass_uses_up_is_refused() -> None:
    """All passes but the first were over nothing."""
    with pytest.raises(TypeError, match=r"^mbkern: sample\(1\) is a generator"):
        plan(lambda rows: sum(rows), lambda n: (torch.ones(4) for _ in range(n)))


def test_a_picture_leaves_the_users_backend(tmp_path: Path) -> None:
    """It switched to Agg, for good."""
    mpl = pytest.importorskip("matplotlib")
    before = mpl.rcParams._get_backend_or_none() or "svg"
    mpl.rcParams["backend"] = "svg"
    try:
        weight = torch.ones(4, requires_grad=True)
        own = mbkern.GradAccumulator([weight])

        def step(x: Tensor) -> Tensor:  # without a function to draw
            loss = (weight * x).sum()
            own.backward(loss, len(x))
            return loss.detach()

        found = plan(step)
        found.save_png(tmp_path / "plan")
        assert mpl.rcParams["backend"] == "svg"
    finally:
        mpl.rcParams["backend"] = before
    assert (tmp_path / "plan").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample": torch.ones(0, 4)}, ValueError, "the sample has no items"),
        ({"step": None}, TypeError, "step must be a function, not NoneType"),
        ({"batch_size": "8"}, TypeError, "batch_size must be an integer, not str"),
        ({"batch_size": 10**30}, ValueError, r"below 2\^53"),
        ({"objective": ["memory"]}, ValueError, "objective must be one of"),
        ({"memory_limit": np.uint64(1 << 20)}, MemoryError, "the limit is 1.0 MiB"),
        ({"memory_limit": 10**400}, ValueError, "memory_limit is too large"),
        ({"memory_limit": torch.ones(2)}, TypeError, "memory_limit must be a number"),
        ({"seconds": 10**400}, ValueError, "seconds is too large"),
        ({"noise_scale": torch.ones(2)}, TypeError, "noise_scale must be a number"),
        ({"noise_scale": 10**400}, ValueError, "noise_scale is too large"),
        ({"noise_scale": 1j}, TypeError, "noise_scale must be a number"),
    ],
)
def test_what_is_none_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(error, match=f"^mbkern: .*{message}"):
        plan(**{"step": lambda x: (weight * x).sum(), **options})


@pytest.mark.parametrize("number", [Fraction, Decimal, torch.tensor, np.float32])
def test_numbers_of_every_kind(number: Any) -> None:
    weight = torch.ones(4, requires_grad=True)
    found = plan(
        lambda x: (weight * x).sum(), seconds=number(0.02), memory_limit=number(2**40),
        noise_scale=number(4.0),
    )  # fmt: skip
    assert found.limit_bytes == 2**40
    assert found.instead.noise_scale == 4
