"""The fused head with options, layouts, dtypes and ways that nobody chose together.

Rounds are few here; ``MBKERN_ROUNDS=5000 pytest tests/test_linear_random.py`` plays as many.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from typing import Any

import pytest
import torch
from linear_random import Case, case, laid_out, reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mbkern
from mbkern import _C
from mbkern import functional as F

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
ROUNDS = int(os.environ.get("MBKERN_ROUNDS", "80"))
NAMES = {"x": "input", "w": "linear_weight", "b": "linear_bias", "s": "logit_scale"}
WAYS = ("autograd", "hint", "buffer", "no graph", "operators", "transform", "formula", "statistics")


def run(c: Case, way: str, names: list[str], incoming: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, one way."""
    t = {k: v.detach().requires_grad_(k in names) for k, v in c.tensors.items()}
    asked = [t[name] for name in names]
    if way == "no graph":
        options = dict(c.options)
        tensors = {NAMES[k]: v.detach() for k, v in t.items() if k not in "xw"}
        with c.context():
            loss, grads = mbkern.loss_and_grad(
                "linear_cross_entropy", t["x"].detach(), t["w"].detach(), c.target,
                argnums=tuple(NAMES[n] for n in names), **tensors, **options,
            )  # fmt: skip
        return loss, list(grads)
    if way == "transform":

        def total(*given: Tensor) -> Any:
            loss = c.head({**c.tensors, **dict(zip(names, given, strict=True))})
            return (loss * incoming).sum(), loss

        of = torch.func.grad(total, tuple(range(len(names))), has_aux=True)
        grads, loss = of(*[c.tensors[n] for n in names])
        return loss, list(grads)
    more: dict[str, Any] = {}
    wide = torch.float64 if c.tensors["w"].dtype is torch.float64 else torch.float32
    if way == "buffer":
        more["accumulate_into"] = torch.zeros(t["w"].shape, dtype=wide)
    more |= {"grad_scale": 4.0} if way == "hint" else {}
    mode = FlopCounterMode(display=False) if way == "operators" else contextlib.nullcontext()
    with mode:
        loss = c.head(t, **more, return_stats=way == "statistics")
        loss = loss[0] if way == "statistics" else loss
        given = incoming.to(loss.dtype).expand(loss.shape)
        if way == "buffer":
            loss.backward(given)
            return loss, [more["accumulate_into"] if a is t["w"] else a.grad for a in asked]
        return loss, list(torch.autograd.grad(loss, asked, given, create_graph=way == "formula"))


def check(got: Tensor, want: Tensor, size: float, most: float, what: Any) -> None:
    assert got.shape == want.shape, what
    got, want = got.detach().double(), want.detach()
    assert torch.equal(got.isnan(), want.isnan()), (what, got, want)
    if want.numel() and not want.isnan().all():
        error = float((got - want).nan_to_num(0).abs().max())
        assert error <= most * size, (what, error, most * size)


def test_against_float64() -> None:
    for seed in range(ROUNDS):
        c = case(seed)
        way = c.r.choice(WAYS)
        names = [n for n in c.tensors if c.r.random() < 0.7] or ["x"]
        names = sorted({*names, "w"}, key="xwbs".index) if way == "buffer" else names
        leaves = {
            k: (v.to(c.product) if k in "xw" else v).double().requires_grad_()
            for k, v in c.tensors.items()
        }
        want, z, factor = reference(c, leaves)
        incoming = torch.ones(()) if way == "no graph" else torch.tensor(c.r.choice([1.0, 0.5]))
        wanted = torch.autograd.grad(
            want, [leaves[n] for n in names], incoming.double().expand(want.shape),
            allow_unused=True,
        )  # fmt: skip
        loss, grads = run(c, way, names, incoming)
        what = (seed, way, c.tensors["x"].dtype, c.options)
        # Logits are rounded to the dtype of the products, relative to their terms; and the results.
        eps = max(torch.finfo(c.product).eps, torch.finfo(loss.dtype).eps)
        if not c.is_index:
            eps = max(eps, torch.finfo(torch.promote_types(c.target.dtype, torch.float32)).eps)
        largest = float(z.detach().abs().max()) if z.numel() else 0.0
        most = 16 * eps * (1 + 2 * largest)
        items = factor.expand(c.items)
        size = float(items.abs().sum()) if want.dim() == 0 else 1.0
        check(loss, want, (size + 1) * (3 + largest) ** 2, most, (what, "loss"))
        for name, got, wanted_of in zip(names, grads, wanted, strict=True):
            assert got.dtype is c.tensors[name].dtype or way == "buffer", (what, name)
            kept = wanted_of if wanted_of is not None else torch.zeros(got.shape).double()
            other = leaves["w" if name == "x" else "x"].detach()
            others = float(other.abs().max()) if z.numel() else 1.0
            at_most = float(items.abs().max()) if items.numel() else 0.0
            rows = at_most if name == "x" else float(items.abs().sum())
            bound = rows * (1 + others) * (2 + largest) * (1 if name != "s" else 3)
            check(got, kept, bound + 1e-3, most + 2 * torch.finfo(got.dtype).eps, (what, name))


def same_bits(got: Tensor, want: Tensor) -> bool:
    if got.dtype is not want.dtype or got.shape != want.shape:
        return False
    a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (got.detach(), want.detach()))
    return torch.equal(a, b)


def play(
    c: Case, o: dict[str, Any], weights: Tensor, wide: torch.dtype, cuts: list[int]
) -> list[Tensor]:
    """What a mini-batch that is cut at these rows comes to."""
    total = mbkern.LossSum()
    given = [c.tensors[n] for n in "wb" if n in c.tensors]
    buffers = [torch.full(t.shape, 0.1, dtype=wide) for t in given]
    found = []
    for begin, end in itertools.pairwise(cuts):
        with c.context():
            loss, (grad, *_) = mbkern.loss_and_grad(
                "linear_cross_entropy", c.tensors["x"][begin:end], c.tensors["w"],
                c.target[begin:end], linear_bias=c.tensors.get("b"),
                argnums=("input", "linear_weight", "linear_bias")[: 1 + len(buffers)],
                grad_out=(None, *buffers), accumulate=True,
                loss_sum=None if wide is torch.float64 else total,
                sample_weight=weights[begin:end], chunk_bytes=c.r.choice([1, 999, None]), **o,
            )  # fmt: skip
        found.append((grad, loss if loss.dim() else loss.new_zeros(0)))
    grads, losses = zip(*found, strict=True)
    return [*buffers, torch.cat(grads), torch.cat(losses), total.value(dtype=torch.float64)]


def test_cuts() -> None:
    """split_invariant: loss terms, the input's gradient and the buffers, however it is cut."""
    for seed in range(ROUNDS):
        c = case(seed)
        x, w = c.tensors["x"], c.tensors["w"]
        rows = x.shape[0] if x.dim() > 1 else 0
        if rows < 2 or (x.dim() == 2 and "shift" in c.options):
            continue
        if c.product is torch.float64 and w.dtype is not torch.float64:
            continue  # sums are held in float64, and buffers are not
        wide = torch.float64 if c.product is torch.float64 else torch.float32
        scale = c.tensors.get("s", c.options.get("logit_scale"))
        o = c.options | {"split_invariant": True, "logit_scale": scale}
        if o["reduction"] == "mean":
            o.setdefault("denominator", 50)
        weights = o.pop("sample_weight", torch.ones(())).expand(c.items)
        o.pop("chunk_bytes", None)

        whole = play(c, o, weights, wide, [0, rows])
        for _ in range(2):
            cuts = sorted({0, rows, *(c.r.randint(0, rows) for _ in range(3))})
            for got, want in zip(play(c, o, weights, wide, cuts), whole, strict=True):
                assert same_bits(got, want), (seed, cuts, c.options)


def test_bits_of_cross_entropy() -> None:
    """Rows that are 1 at one feature each pick their logits out of the weight, and put their
    gradients there: what the head says of logits must have the bits of what the loss says."""
    before = _C.isa()
    for seed in range(ROUNDS):
        c = case(seed)
        r, batch, w = c.r, c.tensors["x"].shape[:-1], c.tensors["w"]
        rows, inner = math.prod(batch), w.shape[1:-1]
        if not 1 <= rows <= 40 or "shift" in c.options or not batch:
            continue
        dtype = c.target.dtype if not c.is_index else c.tensors["x"].dtype
        o = {k: v for k, v in c.options.items() if k not in ("logit_scale", "chunk_bytes")}
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(rows, w.shape[0], *inner, generator=g) * r.choice([1, 5, 30])
        z = z.to(dtype)
        target = c.target.reshape(rows, *([] if c.is_index else w.shape[:1]), *inner)
        like = dict(o)
        like.pop("split_invariant", None)
        if "sample_weight" in o:
            like["sample_weight"] = o["sample_weight"].expand(c.items).reshape(rows, *inner)
        z.requires_grad_()
        want = F.cross_entropy(z, target, **like)
        incoming = torch.full(want.shape, 0.5, dtype=want.dtype)
        (wanted,) = torch.autograd.grad(want, z, incoming)
        order = torch.randperm(rows, generator=g)
        x = torch.eye(rows, dtype=dtype)[order].reshape(*batch, rows)
        weight = torch.empty(*w.shape[:-1], rows, dtype=dtype)
        weight[..., order] = z.detach().movedim(0, -1)
        weight = laid_out(r, weight).detach().requires_grad_()
        way: dict[str, Any] = r.choice([{}, {}, {"chunk_bytes": 300}])
        if dtype in (torch.float32, torch.float64):  # 16-bit gradients would be rounded twice
            way |= r.choice([{}, {"grad_scale": 2.0}])
        _C.set_isa(r.choice(_C.isas()))
        try:
            loss = F.linear_cross_entropy(x, weight, c.target, **o, **way)
            (grad,) = torch.autograd.grad(loss, weight, incoming.reshape(loss.shape))
        finally:
            _C.set_isa(before)
        what = (seed, dtype, o, way)
        if dtype is torch.float64 and loss.dim() == 0:  # its sum goes by chunks
            torch.testing.assert_close(loss, want, rtol=1e-14, atol=1e-300, equal_nan=True)
        else:
            assert same_bits(loss.reshape(want.shape), want), what
        assert same_bits(grad.movedim(-1, 0)[order] + 0.0, wanted + 0.0), what  # no -0
