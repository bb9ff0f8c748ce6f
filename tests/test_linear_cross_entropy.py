"""The fused head gives the loss and the gradients of linear, then cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from linear_cases import Head, check, heads, leaves, limit
from torch import Tensor

import mbkern
from mbkern import _C
from mbkern import functional as F
from mbkern._linear_call import LinearCall

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hint": {"grad_scale": 4.0},
    "small chunks": {"chunk_bytes": 300},
    "split-invariant": {"split_invariant": True, "chunk_bytes": 300},
}


@pytest.mark.parametrize("way", WAYS)
@every_dtype
def test_against_float64(dtype: torch.dtype, way: str) -> None:
    for head in heads():
        t = head.tensors(dtype)
        want = head.expected(t)
        incoming = (torch.arange(want.numel()).reshape(want.shape) % 5 - 1.5).to(dtype)
        wanted = torch.autograd.grad(want, list(leaves(t).values()), incoming.double())
        loss = F.linear_cross_entropy(**t, **head.options(), **WAYS[way])
        assert loss.dtype is dtype
        got = torch.autograd.grad(loss, list(leaves(t).values()), incoming)
        check(loss, want, head, limit("loss", dtype))
        for name, a, b in zip(leaves(t), got, wanted, strict=True):
            assert a.dtype is dtype
            check(a, b, (name, head), limit(name, dtype))
        with torch.no_grad():
            alone = F.linear_cross_entropy(**t, **head.options(), **WAYS[way])
        assert torch.equal(alone, loss), head


def test_each_gradient_only_where_it_is_needed() -> None:
    head = Head(scale=True, ignored=True)
    names = list(leaves(head.tensors(torch.float64)))
    for chosen in range(1, 2 ** len(names)):
        t = head.tensors(torch.float64)
        wanted_names = [n for k, n in enumerate(names) if chosen >> k & 1]
        for n in names:
            t[n] = t[n].detach().requires_grad_(n in wanted_names)
        want = torch.autograd.grad(head.expected(t), [t[n] for n in wanted_names])
        for reduction in ("mean", "none"):
            loss = F.linear_cross_entropy(**t, **{**head.options(), "reduction": reduction})
            total = loss if reduction == "mean" else loss.sum() / (t["target"] != -100).sum()
            got = torch.autograd.grad(total, [t[n] for n in wanted_names])
            for n, a, b in zip(wanted_names, got, want, strict=True):
                check(a, b, (n, wanted_names, reduction), 1e-12)


def test_gradcheck() -> None:
    """First and second derivatives, through every reduction."""
    for head in (Head(), Head("sum", (2,), ignored=True), Head("none", scale=True, softcap=2.0),
                 Head("mean", (), 2, shift=1, class_weight=True, smoothing=0.1)):  # fmt: skip
        t = head.tensors(torch.float64)
        names = list(leaves(t))

        def loss(*values: Tensor, t: Any = t, names: Any = names, head: Any = head) -> Tensor:
            return F.linear_cross_entropy(**{**t, **dict(zip(names, values, strict=True))},
                                          **head.options(), chunk_bytes=400)  # fmt: skip

        inputs = tuple(leaves(t).values())
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)
        assert torch.autograd.gradcheck(
            loss, inputs, fast_mode=True, check_batched_grad=True
        )  # is_grads_batched


@pytest.mark.parametrize("hint", [None, 3.0])
def test_second_backward(hint: float | None) -> None:
    t = Head().tensors(torch.float32)
    loss = F.linear_cross_entropy(**t, grad_scale=hint)
    first = torch.autograd.grad(loss, [t["input"], t["linear_weight"]], retain_graph=True)
    again = torch.autograd.grad(2 * loss, [t["input"], t["linear_weight"]])
    for a, b in zip(first, again, strict=True):
        check(b, 2 * a, "twice", 1e-6)
    with pytest.raises(RuntimeError, match=r"second time|saved tensors"):
        torch.autograd.grad(loss, t["input"])


def test_rows_that_do_not_count() -> None:
    """All ignored, none at all, and what an ignored row holds has no say."""
    t = Head(ignored=True).tensors(torch.float32)
    with torch.no_grad():
        t["input"][t["target"] == -100] = float("nan")
    for reduction in ("mean", "sum", "none"):
        loss = F.linear_cross_entropy(**t, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), list(leaves(t).values()))
        assert loss.isfinite().all()
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][t["target"] == -100] == 0).all()
    t["target"].fill_(-100)
    assert F.linear_cross_entropy(**t).isnan()
    loss = F.linear_cross_entropy(**t, reduction="sum")
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(leaves(t).values())))
    empty = F.linear_cross_entropy(
        t["input"][:0], t["linear_weight"], t["target"][:0], reduction="sum"
    )
    assert empty.item() == 0
    assert F.linear_cross_entropy(
        t["input"][:0], t["linear_weight"], t["target"][:0], reduction="none"
    ).shape == (0,)


def test_unbatched_and_other_layouts() -> None:
    t = Head().tensors(torch.float64)
    x, w, target = t["input"], t["linear_weight"], t["target"]
    one = F.linear_cross_entropy(x[0], w, target[0])
    check(one, TF.cross_entropy(TF.linear(x[0], w), target[0]), "unbatched", 1e-12)
    want = TF.cross_entropy(TF.linear(x, w), target)
    strided = torch.empty(5, 21, dtype=torch.float64).t().copy_(x.detach())
    check(F.linear_cross_entropy(strided, w, target), want, "transposed input", 1e-12)
    layout = torch.empty(5, 11, dtype=torch.float64).t().copy_(w.detach())
    check(F.linear_cross_entropy(x, layout, target), want, "transposed weight", 1e-12)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(F.linear_cross_entropy(x, w, target.to(dtype)).detach(),
                           F.linear_cross_entropy(x, w, target).detach())  # fmt: skip


def test_loss_has_the_same_bits_as_cross_entropy() -> None:
    """Chunks go through exact sums: the loss is that of the logits, whatever the chunk."""
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(64, 16, generator=g), torch.randn(50, 16, generator=g)
    target, weight = torch.randint(50, (64,), generator=g), torch.rand(50, generator=g)
    want = F.cross_entropy(x @ w.t(), target, weight)
    for rows in (64, 32, 16, 8):  # torch's product gives the same bits for these
        got = F.linear_cross_entropy(x, w, target, weight=weight, chunk_bytes=rows * 200)
        assert torch.allclose(got, want, rtol=1e-6)
    losses = {
        F.linear_cross_entropy(
            x, w, target, weight=weight, chunk_bytes=rows * 200, split_invariant=True
        ).item()
        for rows in (64, 32, 7, 1)
    }
    assert len(losses) == 1


def test_autocast_keeps_the_sums_in_float32() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(512, 32, generator=g).requires_grad_()
    w = torch.randn(64, 32, generator=g).requires_grad_()
    target = torch.randint(64, (512,), generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.linear_cross_entropy(x, w, target)
        stock = TF.cross_entropy(TF.linear(x, w), target)
    assert loss.dtype is stock.dtype is torch.float32
    ours = torch.autograd.grad(loss, [x, w])
    theirs = torch.autograd.grad(stock, [x, w])
    exact = torch.autograd.grad(
        TF.cross_entropy(TF.linear(x.bfloat16().double(), w.bfloat16().double()), target), [x, w]
    )
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype is torch.float32
        assert (a - c).abs().max() <= (b - c).abs().max() * 1.1


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": torch.zeros(())}, ValueError, "input must be"),
    ({"linear_weight": torch.zeros(11)}, ValueError, r"linear_weight \(C, in_features\)"),
    ({"linear_weight": torch.zeros(11, 4)}, ValueError, "input has 5 features"),
    ({"linear_weight": torch.zeros(11, 5).double()}, TypeError, "one dtype, except under autocast"),
    ({"input": torch.zeros(21, 5).int()}, TypeError, "must be floating"),
    ({"linear_bias": torch.zeros(3)}, ValueError, r"linear_bias must be \(11,\), not \(3,\)"),
    ({"target": torch.zeros(4).long()}, ValueError, r"target has shape \(4,\)"),
    ({"target": torch.zeros(21)}, TypeError, "class indices are torch.float32"),
    ({"target": torch.zeros(21, 11).long()}, TypeError, "probabilities must be floating"),
    ({"target": torch.zeros(21, 11), "ignore_index": 3}, ValueError, "ignore_index=3"),
    ({"target": torch.zeros(21, 11), "shift": True}, ValueError, "shift goes with class indices"),
    ({"target": torch.full((21,), 11)}, IndexError, r"target 11 of item 0 .* \[0, 11\)"),
    ({"target": torch.full((21,), -1)}, IndexError, "target -1 of item 0"),
    ({"weight": torch.zeros(3)}, ValueError, "one entry for each of the 11 classes"),
    ({"reduction": "median"}, ValueError, "not a valid reduction"),
    ({"reduction": "sum", "denominator": 3.0}, ValueError, "denominator goes with"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    ({"softcap": -1.0}, ValueError, "softcap must be positive"),
    ({"shift": 22}, ValueError, r"shift=22 must be in \[0, 21\]"),
    ({"shift": -1}, ValueError, "shift=-1"),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive, not 0"),
    ({"num_valid": 7}, ValueError, "num_valid is 7, and 21 targets"),
    ({"num_valid": -1}, ValueError, "num_valid must not be negative, it is -1"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan; it must be finite"),
    ({"logit_scale": float("-inf")}, ValueError, "logit_scale is -inf; it must be finite"),
    ({"grad_scale": 0.0}, ValueError, "grad_scale must be finite"),
    (
        {"logit_scale": torch.ones(2)},
        ValueError,
        "logit_scale must be a number or a floating 0-dim",
    ),
    ({"accumulate_into": "grads"}, ValueError, "accumulate_into is a tensor, 'grad' or"),
    ({"accumulate_into": torch.zeros(2, 5)}, ValueError, r"weight's shape \(11, 5\)"),
    ({"accumulate_into": torch.zeros(1, 5).expand(11, 5)}, ValueError, "share memory"),
    ({"accumulate_into": torch._neg_view(torch.zeros(11, 5))}, ValueError, "a negated view"),
    ({"accumulate_into": "main_grad"}, ValueError, "needs a weight that has the attribute"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    t = {**Head().tensors(torch.float32), **wrong}
    with pytest.raises(kind, match=message):
        F.linear_cross_entropy(**t)


# ---- statistics ----------------------------------------------------------------------------------


@every_dtype
def test_statistics(dtype: torch.dtype) -> None:
    for head in (
        Head(), Head("none", ignored=True, leading=2, shift=1), Head("sum", (2,), ignored=True),
        Head(probabilities=True), Head(softcap=2.0, scale=1.5), Head(scale=True, ignored=True),
    ):  # fmt: skip
        t = head.tensors(dtype)
        x, w, b = t["input"].double(), t["linear_weight"].double(), t["linear_bias"].double()
        z = TF.linear(x, w.reshape(-1, 5), b.reshape(-1))
        if head.scale is not None:
            z = z * t["logit_scale"] if head.scale is True else z * head.scale
        target = t["target"]
        if head.shift:
            z, target = z[:, : -head.shift], target[:, head.shift :]
        lead = z.dim() - 1
        z = z.reshape(*z.shape[:-1], 11, *head.inner).movedim(lead, -1)
        if head.softcap:
            z = head.softcap * torch.tanh(z / head.softcap)
        lse = z.logsumexp(-1)
        entropy = torch.distributions.Categorical(logits=z).entropy()
        if head.probabilities:
            counted = torch.ones_like(lse, dtype=torch.bool)
            log_prob = (target.double() * (z - lse.unsqueeze(-1))).sum(-1)
            hit = z.argmax(-1) == target.argmax(-1)
        else:
            counted = target != -100
            known = target.clamp(min=0)
            log_prob = z.gather(-1, known.unsqueeze(-1)).squeeze(-1) - lse
            hit = (z.argmax(-1) == target) & counted
        for more in ({"grad_scale": 2.0}, {"chunk_bytes": 300}, {"split_invariant": True}):
            loss, s = F.linear_cross_entropy(**t, **head.options(), **more, return_stats=True)
            assert torch.equal(loss, F.linear_cross_entropy(**t, **head.options(), **more))
            most = limit("", dtype) * 4
            assert s.items == counted.sum()
            if dtype in (torch.float32, torch.float64):
                assert torch.equal(s.predictions, z.argmax(-1).masked_fill(~counted, -1))
                torch.testing.assert_close(s.accuracy, hit.sum() / counted.sum())
            check(s.log_prob, log_prob.masked_fill(~counted, 0).detach(), head, most)
            check(s.entropy, entropy.masked_fill(~counted, 0).detach(), head, most)
            check(s.lse, lse.masked_fill(~counted, 0).detach(), head, most)
            # The log-sum-exp is differentiable, beside the loss and alone.
            factor = torch.arange(lse.numel()).reshape(lse.shape) % 4 - 1.0
            names = list(leaves(t).values())
            wanted = torch.autograd.grad(
                head.expected(t).sum() + (lse * counted * factor).sum(), names, retain_graph=True
            )
            got = torch.autograd.grad(loss.sum() + (s.lse * factor).sum(), names)
            for a, e, name in zip(got, wanted, leaves(t), strict=True):
                check(a, e, (name, head, more), 4 * limit(name, dtype))
        _, bare = F.linear_cross_entropy(
            **{k: v.detach() if isinstance(v, Tensor) else v for k, v in t.items()},
            **head.options(), return_stats=True,
        )  # fmt: skip
        check(bare.lse, lse.masked_fill(~counted, 0).detach(), head, most)


@pytest.mark.parametrize("probabilities", [False, True])
def test_log_probabilities_do_not_cancel(probabilities: bool) -> None:
    """Of logits around 100, and of a class that is nearly certain: as exact as the loss."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(256, 500, generator=g) * 2 + 100
    target = torch.randint(500, (256,), generator=g)
    z[range(128), target[:128]] = z[:128].amax(1) + 12  # exp(-12), and less, is left for others
    if probabilities:
        target = TF.one_hot(target, 500).float()
    loss, stats = F.linear_cross_entropy(
        z, torch.eye(500), target, return_stats=True, reduction="none"
    )
    exact = -TF.cross_entropy(z.double(), target.double() if probabilities else target,
                              reduction="none")  # fmt: skip
    for rows in (slice(0, 128), slice(128, 256)):
        check(stats.log_prob[rows], exact[rows], "statistics", 2.0**-22)
        check(-loss[rows], exact[rows], "loss", 2.0**-22)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_probabilities_of_another_dtype(dtype: torch.dtype, kind: torch.dtype) -> None:
    """The loss has torch's dtype, on every way; and what is float64 is computed in float64."""
    head = Head(probabilities=True)
    t = head.tensors(dtype)
    t["target"] = t["target"].to(kind)
    want = head.expected(t)
    names = ("input", "linear_weight", "linear_bias")
    wanted = torch.autograd.grad(want, [t[n] for n in names])
    both = torch.promote_types(dtype, kind)
    plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in t.items()}
    torch._dynamo.reset()  # or it would not compile again for ever more dtypes
    compiled = torch.compile(F.linear_cross_entropy, backend="aot_eager")
    imperative, grads = mbkern.loss_and_grad("linear_cross_entropy", argnums=names, **plain)
    losses = [F.linear_cross_entropy(**t), F.linear_cross_entropy(**plain), imperative]
    losses.append(compiled(**t))
    for loss in losses:
        assert loss.dtype is both
        check(loss, want, both, limit("loss", both if both is torch.float64 else dtype))
    for loss in (losses[0], losses[-1]):
        found = torch.autograd.grad(loss, [t[n] for n in names])
        for got in (found, grads):
            for a, b in zip(got, wanted, strict=True):
                assert a.dtype is dtype
                check(a, b, both, limit("", dtype))


def test_statistics_of_nothing_and_under_tracers() -> None:
    t = Head().tensors(torch.float32)
    _, s = F.linear_cross_entropy(
        t["input"][:0], t["linear_weight"], t["target"][:0], return_stats=True
    )
    assert s.items == 0
    assert s.accuracy.isnan()
    assert s.lse.shape == (0,)

    def of(w: Tensor) -> Tensor:
        loss, s = F.linear_cross_entropy(t["input"].detach(), w, t["target"], return_stats=True)
        return loss + s.lse.sum()

    w = t["linear_weight"]
    (want,) = torch.autograd.grad(of(w), w)
    torch.testing.assert_close(torch.func.grad(of)(w.detach()), want)


@pytest.mark.parametrize("features", [200, 300])
def test_logits_whose_rows_are_not_aligned(features: int) -> None:
    """Of these the product is ours, where it is large; its blocks of 256 round up to 1.4 times as
    much as the shorter ones of torch's library, which the softmax makes twice as much."""
    random = torch.Generator().manual_seed(4)
    x = torch.randn(200, features, generator=random)
    w = torch.randn(1003, features, generator=random)
    b = torch.randn(1003, generator=random)
    target = torch.randint(1003, (200,), generator=random)
    seen = []
    original = LinearCall._logits

    def watched(self: LinearCall, *args: Any) -> Tensor:
        seen.append((self.own_logits, self.own))
        return original(self, *args)

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearCall, "_logits", watched)
        for dtype in (torch.float64, torch.float32):
            tensors = [t.to(dtype).requires_grad_() for t in (x, w, b)]
            fused = F.linear_cross_entropy(*tensors[:2], target, linear_bias=tensors[2])
            unfused = TF.cross_entropy(TF.linear(*tensors), target)
            for name, loss in (("ours", fused), ("torch", unfused)):
                results[name, dtype] = [loss, *torch.autograd.grad(loss, tensors)]
    assert seen == [(False, False), (_C.isa() != "scalar", False)]
    exact = results["torch", torch.float64]
    for ours, theirs, e in zip(
        results["ours", torch.float32],
        results["torch", torch.float32], exact, strict=True,
    ):  # fmt: skip
        error, other = ((t.double() - e).square().mean().sqrt() for t in (ours, theirs))
        assert error <= 2 * other + 2.0**-24 * e.abs().max()
