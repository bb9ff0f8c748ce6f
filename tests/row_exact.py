"""Losses of rows and their gradients in fp64, right also for infinite and NaN numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from row_case import RowCase, RowSample
from torch import Tensor

#: Loss and gradients of each item in fp64, and the magnitudes of what they are sums of.
Exact = tuple[list[Tensor], list[Tensor]]


def computed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Softmax:
    """p of rows of logits in fp64, by the rules of docs/numerics.md.

    A logit more than 80 (fp64: 700) below the largest, or -inf, has p = 0 exactly. A row without a
    largest finite logit has none: NaN.
    """

    def __init__(self, x: Tensor, scale: float, dtype: torch.dtype) -> None:
        top, index = x.max(-1, keepdim=True)
        self.none = ~top.isfinite().squeeze(-1) | x.isnan().any(-1)
        self.a = (x - top) * scale
        limit = 700.0 if dtype is torch.float64 else 80.0
        self.e = torch.where(self.a < -limit, 0.0, self.a.exp())
        self.rest = self.e.scatter(-1, index, 0.0).sum(-1, keepdim=True)
        self.p = self.e / (1 + self.rest)
        self.log_p = self.a - self.rest.log1p()

    def mean(self, value: Tensor) -> Tensor:
        """Of ``value`` by p; what has no share does not count, whatever it is."""
        return self.times(value).sum(-1, keepdim=True)

    def times(self, value: Tensor) -> Tensor:
        return torch.where(self.p == 0, 0.0, self.p * value)


def focal(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    gamma = sample.options.get("gamma", 2.0 if name == "softmax_focal_loss" else 0.0)
    scale = 1 / sample.options.get("temperature", 1.0)
    x, target = (t for t in sample.tensors.values())
    s, t = Softmax(x, scale, dtype), target.unsqueeze(-1)
    others = s.e.scatter(-1, t, 0.0)
    q = others.sum(-1, keepdim=True) / (1 + s.rest)
    # 1 + rest is rounded; the rest itself is what counts where the target is the largest
    excess = torch.where(s.a.gather(-1, t) == 0, others.sum(-1, keepdim=True), s.rest)
    minus_log = excess.log1p() - s.a.gather(-1, t)
    weight = sample.options.get("weight")
    w = torch.ones_like(q) if weight is None else weight[target].unsqueeze(-1)
    pull = w * scale * q**gamma
    if gamma:
        ratio = torch.where(q == 0, 1.0, minus_log / q)
        pull = pull * (1 + gamma * s.p.gather(-1, t) * ratio)
    grad = (others / (1 + s.rest) * pull).scatter(-1, t, -q * pull)
    loss = w * q**gamma * minus_log
    return blank(s.none, loss.squeeze(-1), grad), [loss * 0, grad]


def blank(none: Tensor, loss: Tensor, *grads: Tensor) -> list[Tensor]:
    """NaN in items whose distribution there is none of."""
    nan = math.nan
    return [loss.masked_fill(none, nan), *(g.masked_fill(none[:, None], nan) for g in grads)]


def pair(sample: RowSample, dtype: torch.dtype) -> tuple[Softmax, Softmax, float]:
    scale = 1 / sample.options.get("temperature", 1.0)
    student, teacher = (Softmax(sample.tensors[n], scale, dtype) for n in ("student", "teacher"))
    return student, teacher, scale


def kl(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    p, t, scale = pair(sample, dtype)
    reverse = sample.options.get("direction") == "reverse"
    if reverse:
        p, t = t, p
    u = t.log_p - p.log_p
    loss = t.mean(u)
    grads = [scale * (p.p - t.p), scale * t.times(u - loss)]
    sizes = [scale * (p.p + t.p), scale * t.times(u.abs() + loss + 1)]
    if reverse:
        grads, sizes = grads[::-1], sizes[::-1]
    exact = blank(p.none | t.none, loss.squeeze(-1), *grads)
    return exact, [t.mean(u.abs() + 1), *sizes]


def js(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    p, t, scale = pair(sample, dtype)
    beta = sample.options.get("beta", 0.5)
    mixture = (beta * t.p + (1 - beta) * p.p).log()
    loss, size, grads, sizes = torch.zeros(1), torch.zeros(1), [], []
    for one, share in ((p, 1 - beta), (t, beta)):
        u = one.log_p - mixture
        own = one.mean(u)
        loss = loss + share * own
        size = size + share * one.mean(u.abs() + 1)
        grads.append(share * scale * one.times(u - own))
        sizes.append(share * scale * one.times(u.abs() + own + 1))
    return blank(p.none | t.none, loss.squeeze(-1), *grads), [size, *sizes]


def tv(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    p, t, scale = pair(sample, dtype)
    sign = (p.p - t.p).sign()
    grads = [f * scale / 2 * one.times(sign - one.mean(sign)) for one, f in ((p, 1), (t, -1))]
    exact = blank(p.none | t.none, (p.p - t.p).abs().sum(-1) / 2, *grads)
    return exact, [torch.ones(1), scale * p.p, scale * t.p]


def entropy(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    scale = 1 / sample.options.get("temperature", 1.0)
    s = Softmax(sample.tensors["input"], scale, dtype)
    own = s.mean(-s.a)
    exact = blank(s.none, (s.rest.log1p() + own).squeeze(-1), -scale * s.times(s.a + own))
    return exact, [own * 0, scale * s.times(s.a.abs() + own)]


def by_autograd(
    sample: RowSample, case: RowCase, function: Callable[..., Tensor], dtype: torch.dtype
) -> list[Tensor]:
    wide, leaves = case.leaves(sample.to(dtype))
    loss = function(**wide.tensors, **wide.options)
    grads = torch.autograd.grad(loss.sum(), leaves)
    return [loss.detach().double(), *(g.double() for g in grads)]


SOFTMAXES = {
    "cross_entropy": focal, "softmax_focal_loss": focal, "info_nce_loss": focal,
    "kl_div_with_logits": kl, "js_div_with_logits": js, "tv_distance_with_logits": tv,
    "entropy_with_logits": entropy,
}  # fmt: skip


def in_torch(case: RowCase) -> Callable[..., Tensor]:
    # The slope at a margin differs between versions of torch: see docs/numerics.md
    if case.torch is None or case.name in ("cosine_embedding_loss", "triplet_margin_loss"):
        return lambda **given: case.terms(**given)[0]
    function = case.torch
    return lambda **given: function(**given, reduction="none")


def exact(case: RowCase, sample: RowSample) -> Exact:
    """By torch's function, or by the formula."""
    wide = sample.to(torch.float64)
    dtype = computed(sample.tensors[case.inputs[0]].dtype)
    if case.name in SOFTMAXES:
        want, sizes = SOFTMAXES[case.name](wide, dtype, case.name)
        return want, [s.squeeze(-1) if k == 0 else s for k, s in enumerate(sizes)]
    want = by_autograd(sample, case, in_torch(case), torch.float64)
    if case.name == "multilabel_soft_margin_loss":
        # torch subtracts logarithms of numbers near 1/2, which leaves nothing of a small x
        weight = wide.options.get("weight", 1.0)
        want[2] = -wide.tensors["input"] * weight / wide.tensors["input"].shape[-1]
    if case.size is None:
        return want, [torch.zeros(())] * len(want)
    finite = {n: t.nan_to_num(0, 0, 0) if n in case.inputs else t for n, t in wide.tensors.items()}
    sizes = case.size(**finite, **wide.options)
    return want, [s.detach().nan_to_num(0, 0, 0) for s in sizes]
