"""The head's weight gradient added in place, once each: to buffers, ``.grad``, ``main_grad``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from linear_cases import Head, check, heads, leaves, limit
from torch import Tensor
from torch._dynamo import compiled_autograd

import mbkern
from mbkern import functional as F

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
compiles_backward = pytest.mark.skipif(
    not hasattr(TF, "linear_cross_entropy"),
    reason="NOT CHECKED: torch's compiled autograd takes Functions of Python from 2.13 on",
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@every_dtype
def test_a_tensor_is_added_into(dtype: torch.dtype) -> None:
    for head in heads():
        t = head.tensors(dtype)
        want = head.expected(t)
        incoming = (torch.arange(want.numel()).reshape(want.shape) % 5 - 1.5).to(dtype)
        wanted = dict(
            zip(leaves(t), torch.autograd.grad(want, list(leaves(t).values()), incoming.double()),
                strict=True)
        )  # fmt: skip
        before = torch.randn(t["linear_weight"].shape).to(wide(dtype))
        buffer = before.clone()
        loss = F.linear_cross_entropy(**t, **head.options(), accumulate_into=buffer)
        assert torch.equal(buffer, before), "forward has written"
        loss.backward(incoming)
        assert t["linear_weight"].grad is None
        # Not rounded to the operands' dtype: held to float32's limit where they are exact.
        check(buffer - before, wanted.pop("linear_weight"), head, limit("", dtype) * 4)
        for name, value in wanted.items():
            check(t[name].grad, value, (name, head), limit(name, dtype))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64, torch.float16])
def test_buffers_of_other_dtypes(kind: torch.dtype) -> None:
    t = Head().tensors(torch.float32)
    exact = torch.autograd.grad(Head().expected(t), t["linear_weight"])[0]
    buffer = torch.ones(11, 5, dtype=kind)
    F.linear_cross_entropy(**t, accumulate_into=buffer).backward()
    check(buffer, 1 + exact, kind, max(torch.finfo(kind).eps, 1e-6))


def test_layouts_of_buffers() -> None:
    t = Head().tensors(torch.float32)
    exact = torch.autograd.grad(Head().expected(t), t["linear_weight"])[0]
    for buffer in (torch.zeros(5, 11).t(), torch.zeros(11, 10)[:, ::2], torch.zeros(22, 5)[::2]):
        F.linear_cross_entropy(**t, accumulate_into=buffer).backward()
        check(buffer, exact, buffer.stride(), 1e-5)


def test_nothing_is_counted_that_did_not_happen() -> None:
    """Forward alone, a checkpoint's second forward, an exception on the way back."""
    t = Head().tensors(torch.float32)
    buffer = torch.zeros(11, 5)

    def head(x: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            x, t["linear_weight"], t["target"], linear_bias=t["linear_bias"], accumulate_into=buffer
        )

    head(t["input"])
    assert (buffer == 0).all()
    head(t["input"]).backward()
    once = buffer.clone()
    buffer.zero_()
    torch.utils.checkpoint.checkpoint(head, t["input"], use_reentrant=False).backward()
    assert torch.equal(buffer, once)
    buffer.zero_()

    def fail(_: Tensor) -> None:
        raise RuntimeError("on the way")

    x = t["input"].detach().requires_grad_()
    loss = head(x) * 1.0
    loss.register_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        loss.backward()
    assert (buffer == 0).all()
    loss = head(x)
    t["target"][0] = 99  # changed since: a class that is none
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert (buffer == 0).all()
    with pytest.raises(IndexError, match="target 99 of item 0"):
        mbkern.loss_and_grad(
            "linear_cross_entropy", x.detach(), t["linear_weight"].detach(), t["target"],
            argnums=1, grad_out=buffer, accumulate=True,
        )  # fmt: skip
    assert (buffer == 0).all()


def test_second_derivatives_are_refused() -> None:
    t = Head().tensors(torch.float32)
    loss = F.linear_cross_entropy(**t, accumulate_into=torch.zeros(11, 5))
    with pytest.raises(RuntimeError, match="accumulate_into gives no gradient that can itself"):
        torch.autograd.grad(loss, t["input"], create_graph=True)


def test_grad() -> None:
    """The first micro-batch creates it, later ones add to it; in float32 where the leaf says so."""
    head = Head()
    t = head.tensors(torch.float32)
    w = t["linear_weight"]
    exact = torch.autograd.grad(head.expected(t), w)[0]
    for times in (1, 2, 3):
        F.linear_cross_entropy(**t, accumulate_into="grad").backward()
        check(w.grad, times * exact, times, 1e-5)
    held = w.grad
    F.linear_cross_entropy(**t, accumulate_into="grad").backward()
    assert w.grad is held, "added in place"
    with pytest.raises(ValueError, match="that is a leaf"):
        F.linear_cross_entropy(**{**t, "linear_weight": w * 2}, accumulate_into="grad")
    if hasattr(Tensor, "grad_dtype"):
        t = head.tensors(torch.bfloat16)
        w = t["linear_weight"]
        w.grad_dtype = torch.float32
        exact = torch.autograd.grad(head.expected(t), w)[0]
        for _ in range(64):
            F.linear_cross_entropy(**t, accumulate_into="grad").backward()
        assert w.grad.dtype is torch.float32
        check(w.grad, 64 * exact, "64 micro-batches", 1e-2)


@compiles_backward
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_grad_under_compiled_autograd() -> None:
    """It takes back a ``.grad`` that is set behind its back: the weight's gradient was lost."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 4, generator=g).requires_grad_()
    x, y = torch.randn(5, 4, generator=g), torch.randint(6, (5,), generator=g)

    def loss(**into: Any) -> Tensor:
        first: Tensor = F.linear_cross_entropy(x, weight, y, **into)
        return first + F.linear_cross_entropy(-x, weight, y, **into)

    (want,) = torch.autograd.grad(loss(), weight)
    total = loss(accumulate_into="grad")
    with compiled_autograd._enable(torch.compile(backend="eager")):
        total.backward()
    assert weight.grad is not None
    check(weight.grad, want, "compiled", 1e-6)


def test_main_grad() -> None:
    head = Head()
    t = head.tensors(torch.bfloat16)
    w = t["linear_weight"]
    exact = torch.autograd.grad(head.expected(t), w)[0].float()
    w.main_grad = torch.ones(11, 5)
    loss = F.linear_cross_entropy(**t, accumulate_into="main_grad")
    loss.backward()
    assert w.grad is None
    check(w.main_grad, 1 + exact, "added", 1e-2)
    w.grad_added_to_main_grad, w.zero_out_wgrad, w.overwrite_main_grad = False, True, True
    F.linear_cross_entropy(**t, accumulate_into="main_grad").backward()
    check(w.main_grad, exact, "overwritten", 1e-2)
    assert w.grad_added_to_main_grad
    assert w.grad is not None
    assert (w.grad == 0).all(), "a dummy, so that hooks run"


# ---- loss_and_grad -------------------------------------------------------------------------------


@every_dtype
def test_imperative(dtype: torch.dtype) -> None:
    for head in heads():
        t = head.tensors(dtype)
        want = head.expected(t)
        names = list(leaves(t))
        wanted = torch.autograd.grad(want.sum(), list(leaves(t).values()))
        plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in t.items()}
        loss, grads = mbkern.loss_and_grad(
            "linear_cross_entropy", argnums=tuple(names), **plain, **head.options()
        )
        check(loss, want, head, limit("loss", dtype))
        for name, got, expected in zip(names, grads, wanted, strict=True):
            assert got.dtype is dtype
            check(got, expected, (name, head), limit(name, dtype))
        # Added into buffers, times a factor.
        outs = tuple(
            torch.ones(t[n].shape, dtype=wide(dtype)) if n.startswith("linear") else None
            for n in names
        )
        _, again = mbkern.loss_and_grad(
            "linear_cross_entropy", argnums=tuple(names), grad_out=outs, accumulate=True,
            scale=2.0, **plain, **head.options(),
        )  # fmt: skip
        for name, out, got, expected in zip(names, outs, again, wanted, strict=True):
            if out is not None:
                assert got is out
                check(out - 1, 2 * expected, (name, head), limit(name, dtype) * 4)
            else:
                check(got, 2 * expected, (name, head), limit(name, dtype))


def test_imperative_numpy_and_refusals() -> None:
    t = {k: v for k, v in Head().tensors(torch.float32).items() if v is not None}
    arrays: dict[str, Any] = {k: v.detach().numpy() for k, v in t.items()}
    buffer = np.zeros((11, 5), np.float32)
    loss, (dx, dw) = mbkern.loss_and_grad(
        "linear_cross_entropy", argnums=("input", "linear_weight"), grad_out=(None, buffer),
        accumulate=True, **arrays,
    )  # fmt: skip
    want = Head().expected(Head().tensors(torch.float32))
    assert abs(loss - want.item()) < 1e-5
    assert dx.shape == (21, 5)
    assert np.shares_memory(dw, buffer)
    assert np.abs(buffer).sum() > 0
    x, w, target = (t[n].detach() for n in ("input", "linear_weight", "target"))
    call = mbkern.loss_and_grad
    for argnums in (2, "target", ("input", "input"), "linear_bias", 7):
        with pytest.raises(ValueError, match="argnums"):
            call("linear_cross_entropy", x, w, target, argnums=argnums)
    with pytest.raises(RuntimeError, match="outside autograd"):
        call("linear_cross_entropy", x, w.clone().requires_grad_(), target)
    with pytest.raises(TypeError, match="target is missing"):
        call("linear_cross_entropy", x, w)
    with pytest.raises(ValueError, match="is input itself"):
        call("linear_cross_entropy", x, w, target, grad_out=x)
    with pytest.raises(ValueError, match="overlaps another argument"):
        call("linear_cross_entropy", x, w, target, argnums=1, grad_out=w, accumulate=True)
    out = torch.zeros(21, 5)  # one tensor for two gradients
    with pytest.raises(ValueError, match="overlaps another argument"):
        call("linear_cross_entropy", x, x + 1, target, argnums=(0, 1), grad_out=(out, out))
    with pytest.raises(TypeError, match="float64 losses are refused"):
        call("linear_cross_entropy", x.double(), w.double(), target, loss_sum=mbkern.LossSum())


def test_loss_sum_and_denominator_over_micro_batches() -> None:
    """Ragged micro-batches with one denominator: the loss and the gradient of the mini-batch."""
    t = Head(ignored=True).tensors(torch.float32)
    x, w, target = (t[n].detach() for n in ("input", "linear_weight", "target"))
    count = int((target != -100).sum())
    leaf = w.double().requires_grad_()
    want = TF.cross_entropy(TF.linear(x.double(), leaf), target)
    (exact,) = torch.autograd.grad(want, leaf)
    losses = set()
    for cut in ([21], [5, 16], [1] * 21, [20, 1]):
        total, buffer = mbkern.LossSum(), torch.zeros(11, 5)
        for a, b in zip(x.split(cut), target.split(cut), strict=True):
            mbkern.loss_and_grad(
                "linear_cross_entropy", a, w, b, argnums=1, grad_out=buffer, accumulate=True,
                denominator=count, loss_sum=total, split_invariant=True,
            )  # fmt: skip
        check(buffer, exact, cut, 1e-5)
        losses.add(total.value(count).item())
    assert len(losses) == 1
    assert abs(losses.pop() - want.item()) < 1e-6
