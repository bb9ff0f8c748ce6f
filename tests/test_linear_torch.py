"""The fused head beside torch's: samples, errors, modules, transforms, torch.compile."""

from __future__ import annotations

import copy
import functools
import io
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from linear_cases import Head, check, leaves
from torch import Tensor, library
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import mbkern
import mbkern.nn
from mbkern import functional as F

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
HAS_TORCHS = pytest.mark.skipif(
    not hasattr(TF, "linear_cross_entropy"), reason="torch has had linear_cross_entropy since 2.13"
)
OPS = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]


@HAS_TORCHS
@every_dtype
def test_torchs_samples(dtype: torch.dtype) -> None:
    seen = 0
    for op in OPS:  # plain, chunked, chunked without reduction
        torch.manual_seed(0)
        random.seed(0)
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            args = [sample.input, *sample.args]
            plain = {k: v for k, v in sample.kwargs.items() if k != "options"}
            wide = [a.detach().double().requires_grad_() if a.is_floating_point() else a
                    for a in args]  # fmt: skip
            exact = TF.linear_cross_entropy(
                *wide, **{k: v.double() if isinstance(v, Tensor) else v for k, v in plain.items()}
            )
            got = F.linear_cross_entropy(*args, **sample.kwargs)
            stock = TF.linear_cross_entropy(*args, **plain)
            assert got.dtype is stock.dtype
            assert got.shape == stock.shape
            slack = torch.finfo(dtype).eps * (4 if dtype is not torch.float64 else 256)
            incoming = torch.arange(got.numel()).reshape(got.shape) % 5 + 1
            values = zip(
                (got, *_grads(got, args, incoming)), (stock, *_grads(stock, args, incoming)),
                (exact, *_grads(exact, wide, incoming)), strict=True,
            )  # fmt: skip
            for a, b, c in values:
                if c.numel() and c.isfinite().all():
                    top = c.abs().max()
                    ours = (a.double() - c).abs().max()
                    theirs = (b.double() - c).abs().max()
                    assert ours <= theirs * 1.5 + slack * top, (op.variant_test_name, sample.kwargs)
            seen += 1
    assert seen > 20


def _grads(loss: Tensor, args: list[Tensor], incoming: Tensor) -> tuple[Tensor, ...]:
    wanted = [a for a in args[:2] if a.requires_grad]
    return torch.autograd.grad(loss, wanted, incoming.to(loss.dtype), allow_unused=True)


@HAS_TORCHS
def test_torchs_error_samples() -> None:
    for op in OPS:
        if op.error_inputs_func is None:
            continue
        for error in op.error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
                F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


@HAS_TORCHS
@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")
def test_torchs_module_samples() -> None:
    info = next(m for m in module_db if m.module_cls is torch.nn.LinearCrossEntropyLoss)
    seen = 0
    for entry in info.module_inputs_func(
        info, "cpu", torch.float32, requires_grad=True, training=True
    ):
        make, call = entry.constructor_input, entry.forward_input
        if call is None:
            continue
        stock = torch.nn.LinearCrossEntropyLoss(*make.args, **make.kwargs)
        ours = mbkern.nn.LinearCrossEntropyLoss(*make.args, **make.kwargs)
        assert ours.state_dict().keys() == stock.state_dict().keys()
        ours.load_state_dict(stock.state_dict())
        a, b = ours(*call.args, **call.kwargs), stock(*call.args, **call.kwargs)
        torch.testing.assert_close(a, b)
        a.sum().backward()
        mine = ours.linear.weight.grad
        b.sum().backward()
        torch.testing.assert_close(mine, stock.linear.weight.grad)
        seen += 1
    assert seen > 3


def test_module() -> None:
    """Pickle, copies, a weight tied to an embedding's, its repr."""
    embedding = torch.nn.Embedding(11, 5)
    head = mbkern.nn.LinearCrossEntropyLoss(5, 11, bias=True, shift=True, z_loss=1e-3)
    head.linear.weight = embedding.weight
    ids = torch.randint(11, (2, 6))
    loss = head(embedding(ids), ids)
    loss.backward()
    assert embedding.weight.grad is not None
    for other in (copy.deepcopy(head), torch.load(_saved(head), weights_only=False)):
        assert torch.equal(other(embedding(ids), ids), loss)
    assert "num_classes=11" in repr(head)


def _saved(module: torch.nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


# ---- transforms ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_transforms_and_tracers() -> None:
    t = Head().tensors(torch.float64)
    x, w, target = t["input"].detach(), t["linear_weight"].detach(), t["target"]
    loss = functools.partial(F.linear_cross_entropy, target=target)

    def of(x: Tensor, w: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, w, target)

    want = of(x, w)
    leaf = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, leaf), leaf)
    torch.testing.assert_close(torch.func.grad(of, argnums=1)(x, w), grad)
    many = torch.func.vmap(of, in_dims=(None, 0))(x, torch.stack([w, 2 * w]))
    torch.testing.assert_close(many[0], want)
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), want)
    (grad_c,) = torch.autograd.grad(compiled(x, leaf), leaf)
    torch.testing.assert_close(grad_c, grad)
    assert F.linear_cross_entropy(
        x.to("meta"), w.to("meta"), target.to("meta"), reduction="none"
    ).shape == (21,)


def test_gradient_of_class_probabilities() -> None:
    head = Head(probabilities=True)
    t = head.tensors(torch.float64)
    t["target"] = t["target"].detach().requires_grad_()
    (want,) = torch.autograd.grad(head.expected(t), t["target"])
    (got,) = torch.autograd.grad(F.linear_cross_entropy(**t), t["target"])
    check(got, want, "target", 1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    for head in (
        Head(), Head("none", ignored=True, leading=2, shift=1),
        Head("sum", (2,), scale=True, class_weight=True, sample_weight=True),
        Head(probabilities=True, scale=1.5, softcap=3.0),
    ):  # fmt: skip
        torch._dynamo.reset()
        t = head.tensors(dtype)

        def of(head: Head = head, **t: Any) -> Tensor:
            return F.linear_cross_entropy(**t, **head.options())

        want = of(**t)
        got = torch.compile(of, fullgraph=True, backend="aot_eager")(**t)
        assert torch.equal(got, want)
        values = list(leaves(t).values())
        for a, b in zip(
            torch.autograd.grad(got.sum(), values), torch.autograd.grad(want.sum(), values),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b), head


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiled_for_any_number_of_rows() -> None:
    t = Head(bias=False).tensors(torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(F.linear_cross_entropy, fullgraph=True, backend=counter, dynamic=True)
    frames = set()
    for rows in (21, 5, 8, 13):
        x, target = t["input"][:rows].detach().clone(), t["target"][:rows].clone()
        torch.testing.assert_close(
            compiled(x, t["linear_weight"], target),
            F.linear_cross_entropy(x, t["linear_weight"], target),
        )
        frames.add(counter.frame_count)
    assert len(frames) == 1, "compiled again"


def test_operators() -> None:
    t = Head().tensors(torch.float32)
    library.opcheck(
        torch.ops.mbkern.linear_loss.default,
        (t["input"], t["linear_weight"], t["linear_bias"], None, t["target"], None, None, None,
         "mean", -100, 0.0, 0.0, 0.0, None, 0, None, None, False, None, torch.float32,
         torch.float32),
    )  # fmt: skip


@HAS_TORCHS
def test_patched() -> None:
    """torch's function and module run here, chunk by chunk, where that is exact."""
    head = Head(ignored=True, class_weight=True)
    t = head.tensors(torch.float64)
    t = {k: v for k, v in t.items() if k not in ("sample_weight", "logit_scale")}
    want = TF.linear_cross_entropy(**t)
    wanted = torch.autograd.grad(want, list(leaves(t).values()))
    module = torch.nn.LinearCrossEntropyLoss(5, 11).double()
    with mbkern.patched(report=True) as report:
        loss = TF.linear_cross_entropy(**t)
        got = torch.autograd.grad(loss, list(leaves(t).values()))
        module(t["input"], t["target"]).backward()
        TF.linear_cross_entropy(t["input"].to_sparse().to_dense(), t["linear_weight"], t["target"])
        with pytest.raises(RuntimeError):
            TF.linear_cross_entropy(t["input"], t["linear_weight"][:, :3], t["target"])
        with torch.autocast("cpu", torch.bfloat16):
            TF.linear_cross_entropy(t["input"].float(), t["linear_weight"].float(), t["target"])
    check(loss, want, "loss", 1e-12)
    for a, b in zip(got, wanted, strict=True):
        check(a, b, "gradient", 1e-12)
    assert report.taken["linear_cross_entropy"] == 3
    reasons = {reason for name, reason in report.passed_on if name == "linear_cross_entropy"}
    assert "refused by mbkern" in reasons
    assert any("autocast" in reason for reason in reasons)
