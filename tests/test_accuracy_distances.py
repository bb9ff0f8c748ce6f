"""Distances of distributions that are alike: their gradients are small differences of each class.

The reference is fp64, of p - t without cancellation: with e and f the terms of a softmax, S and F
their sums, (e - f) / F + e (F - S) / (S F), where F - S is the sum of f - e.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mbkern import functional as F

Three = tuple[Tensor, Tensor, Tensor]


class Alike:
    """p, t, p - t and log t - log p of two rows of logits."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        a, b = (z.double() - z.double().amax(1, keepdim=True) for z in (x, y))
        e, f = a.exp(), b.exp()
        s, total = e.sum(1, keepdim=True), f.sum(1, keepdim=True)
        more = (f - e).sum(1, keepdim=True)
        self.p, self.t = e / s, f / total
        self.less = (e - f) / total + e * more / (s * total)
        self.log_ratio = b - a - torch.log1p(more / s)


def _sum(terms: Tensor) -> Tensor:
    return terms.sum(1, keepdim=True)


def _kl(of: Alike) -> Three:
    u = of.log_ratio
    near = of.t * (u**2 / 2 - u**3 / 6 + u**4 / 24)
    loss = _sum(torch.where(u.abs() < 1e-3, near, of.t * u - of.t + of.p))
    return loss, of.less, of.t * (u - loss)


def _js(of: Alike) -> Three:
    m = (of.p + of.t) / 2
    r = of.less / 2 / m  # p = m (1 + r), t = m (1 - r)

    def excess(r: Tensor) -> Tensor:  # (1 + r) log(1 + r) - r
        return torch.where(
            r.abs() < 1e-4, r**2 / 2 - r**3 / 6 + r**4 / 12, (1 + r) * torch.log1p(r) - r
        )

    own, other = _sum(m * excess(r)), _sum(m * excess(-r))
    of_x, of_y = (torch.log1p(r) - own) * of.p / 2, (torch.log1p(-r) - other) * of.t / 2
    return (own + other) / 2, of_x, of_y


def _tv(of: Alike) -> Three:
    sign = of.less.sign()

    def bracket(q: Tensor) -> Tensor:  # sign - sum q sign, as sums of one sign
        above, below = _sum(q * (1 - sign)), _sum(q * (1 + sign))
        return torch.where(sign > 0, above, torch.where(sign < 0, -below, (above - below) / 2))

    return _sum(of.less.abs()) / 2, of.p * bracket(of.p) / 2, -of.t * bracket(of.t) / 2


DISTANCES: dict[str, tuple[Callable[..., Tensor], Callable[[Alike], Three]]] = {
    "kl": (F.kl_div_with_logits, _kl),
    "js": (F.js_div_with_logits, _js),
    "tv": (F.tv_distance_with_logits, _tv),
}


def _check(name: str, x: Tensor, y: Tensor, most: float) -> None:
    function, formula = DISTANCES[name]
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = function(x, y, reduction="none")
    got = (loss.detach()[:, None], *torch.autograd.grad(loss.sum(), [x, y]))
    for result, want in zip(got, formula(Alike(x.detach(), y.detach())), strict=True):
        largest = want.abs().amax(1, keepdim=True)
        assert (((result - want) / largest).abs() <= most).all(), name


# Lanes across rows, along a row, several blocks.
@pytest.mark.parametrize("columns", [10, 300, 2500])
@pytest.mark.parametrize("name", DISTANCES)
def test_one_unlikely_class_differs(name: str, columns: int) -> None:
    """p and t are alike but for a factor in all classes but one, whatever that one is worth."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(8, columns, generator=g) * 4
    for more in (1.0, -1.0):
        y = x.clone()
        y[torch.arange(8), x.argmin(1)] += more
        _check(name, x, y, 1e-5)
        _check(name, y, x, 1e-5)


@pytest.mark.parametrize("columns", [10, 300, 2500])
@pytest.mark.parametrize("name", DISTANCES)
def test_one_class_is_nearly_certain(name: str, columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    x, y = (torch.randn(8, columns, generator=g) for _ in range(2))
    x[:, 3], y[:, 3] = 22, 21
    _check(name, x, y, 3e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_all_classes_differ_a_little(name: str) -> None:
    g = torch.Generator().manual_seed(2500)
    x = torch.randn(8, 2500, generator=g) * 4
    y = x + torch.randn(8, 2500, generator=g) * 1e-3
    _check(name, x, y, 1.2e-4)  # the exponentials' own 1e-7, of differences of 1e-3
