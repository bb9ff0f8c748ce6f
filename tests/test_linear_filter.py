"""``filter_eps``: what is left out of the head's products is as small as is said."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import mbkern
from mbkern import functional as F

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def confident(
    dtype: torch.dtype, rows: int = 200, classes: int = 900, features: int = 24
) -> dict[str, Any]:
    """Hidden states and a weight whose logits single out a few classes."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(classes, features, generator=g)
    target = torch.randint(classes // 9, (rows,), generator=g)
    x = 3 * w[target] + torch.randn(rows, features, generator=g)
    return {"input": x.to(dtype), "linear_weight": w.to(dtype), "target": target}


def gradients(t: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    w = t["linear_weight"]
    buffer = torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32))
    _, (dx, dw) = mbkern.loss_and_grad(
        "linear_cross_entropy", **t, argnums=(0, 1), grad_out=(None, buffer), accumulate=True,
        **more,
    )  # fmt: skip
    return dx, dw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_error(dtype: torch.dtype, reduction: str) -> None:
    t = confident(dtype)
    x, w = t["input"].double(), t["linear_weight"].double()
    weights = torch.linspace(0.1, 2.0, 200)
    for more in ({}, {"sample_weight": weights}):
        exact = gradients(t, reduction=reduction, **more)
        for eps in (1e-2, "auto"):
            got = gradients(t, reduction=reduction, filter_eps=eps, **more)
            number = torch.finfo(dtype).eps / 32 if eps == "auto" else eps
            factor = 2.0 if more else 1.0
            factor /= (weights.sum().item() if more else 200) if reduction == "mean" else 1
            ulp = torch.finfo(dtype).eps
            bound = number * factor * w.abs().sum(0) + 4 * ulp * exact[0].double().abs().max()
            assert ((got[0].double() - exact[0].double()).abs() <= bound).all(), eps
            bound = number * factor * x.abs().sum(0) + 1e-5 * exact[1].double().abs().max()
            assert ((got[1].double() - exact[1].double()).abs() <= bound).all(), eps
            if eps == 1e-2:
                assert (got[1] == 0).sum() > (exact[1] == 0).sum(), "nothing was left out"


def test_through_autograd_and_with_buffers() -> None:
    t = confident(torch.float32)
    leaves = {k: t[k].requires_grad_() for k in ("input", "linear_weight")}
    for more in ({}, {"grad_scale": 2.0}, {"accumulate_into": "grad"}, {"reduction": "sum"}):
        t["linear_weight"].grad = t["input"].grad = None
        F.linear_cross_entropy(**t, filter_eps=1e-3, **more).backward()
        z = TF.linear(t["input"], t["linear_weight"])
        loss = TF.cross_entropy(z, t["target"], reduction=more.get("reduction", "mean"))
        for got, want in zip(
            (leaf.grad for leaf in leaves.values()),
            torch.autograd.grad(loss, list(leaves.values())), strict=True,
        ):  # fmt: skip
            assert got is not None
            assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_what_is_not_a_number_is_not_left_out() -> None:
    t = confident(torch.float32)
    t["input"][7, 3] = float("nan")
    dx, dw = gradients(t, filter_eps=0.5)
    assert dx[7].isnan().all()
    assert dw.isnan().all()


def test_one_infinite_factor_does_not_leave_out_the_rest() -> None:
    """An incoming gradient, and a weight: only its own row is not finite."""
    t = confident(torch.float32)
    exact, _ = gradients(t, reduction="sum")
    bound = 1e-4 * t["linear_weight"].abs().sum(0) + 1e-5 * exact.abs().max()
    leaf, weights = t["input"].clone().requires_grad_(), torch.ones(200)
    others = torch.arange(200) != 7
    for number in (float("inf"), float("nan")):
        weights[7] = number
        loss = F.linear_cross_entropy(**{**t, "input": leaf}, reduction="none", filter_eps=1e-4)
        (incoming,) = torch.autograd.grad(loss, leaf, weights)
        weighted, _ = gradients(t, reduction="sum", filter_eps=1e-4, sample_weight=weights)
        for found in (incoming, weighted):
            assert (found - exact)[others].abs().le(bound).all()
            assert not found[7].isfinite().any()


@pytest.mark.slow
def test_it_saves_time() -> None:
    t = confident(torch.float32, rows=256, classes=20000, features=256)
    times: dict[float, list[float]] = {0.0: [], 1e-3: []}
    for _ in range(5):
        for eps, found in times.items():
            begin = time.perf_counter()
            gradients(t, filter_eps=eps)
            found.append(time.perf_counter() - begin)
    assert min(times[1e-3]) < 0.8 * min(times[0.0])


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [({"filter_eps": -1.0}, ValueError), ({"filter_eps": 1.0}, ValueError),
     ({"filter_eps": "automatic"}, ValueError),
     ({"filter_eps": 1e-3, "split_invariant": True}, ValueError)],
)  # fmt: skip
def test_refusals(wrong: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="filter_eps"):
        F.linear_cross_entropy(**confident(torch.float32, 5, 9), **wrong)
