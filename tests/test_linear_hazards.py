"""What goes wrong with fused heads elsewhere, or went wrong here: counted twice, lost, or stale."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from linear_cases import Head, check
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mbkern
import mbkern.nn
from mbkern import functional as F

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
head = F.linear_cross_entropy


@pytest.fixture
def t() -> dict[str, Any]:
    g = torch.Generator().manual_seed(11)
    return {
        "x": torch.randn(6, 5, generator=g).requires_grad_(),
        "w": torch.randn(7, 5, generator=g).requires_grad_(),
        "b": torch.randn(7, generator=g).requires_grad_(),
        "y": torch.randint(7, (6,), generator=g),
        "buffer": torch.zeros(7, 5),
    }


def weight_gradient(t: dict[str, Any]) -> Tensor:
    (grad,) = torch.autograd.grad(TF.cross_entropy(TF.linear(t["x"], t["w"]), t["y"]), t["w"])
    return grad


# ---- backwards that do not go on to the weight ---------------------------------------------------


def test_a_backward_for_the_input_alone_adds_nothing(t: dict[str, Any]) -> None:
    x, w, y, buffer = t["x"], t["w"], t["y"], t["buffer"]
    torch.autograd.grad(head(x, w, y, accumulate_into=buffer), x)
    head(x, w, y, accumulate_into="grad").backward(inputs=[x])
    assert (buffer == 0).all()
    assert w.grad is None
    # First for the input, then for the weight: pipelines without bubbles.
    h = x * 1
    loss = head(h, w, y, accumulate_into=buffer)
    torch.autograd.grad(loss, h, retain_graph=True)
    assert (buffer == 0).all()
    loss.backward(inputs=[w])
    check(buffer, weight_gradient(t), "once", 1e-5)


def test_autograd_grad_of_an_accumulated_weight_is_refused(t: dict[str, Any]) -> None:
    loss = head(t["x"], t["w"], t["y"], accumulate_into=t["buffer"])
    with pytest.raises(RuntimeError, match="leave it out, or call without accumulate_into"):
        torch.autograd.grad(loss, [t["x"], t["w"]])
    assert (t["buffer"] == 0).all()


# ---- what was saved, and what has changed since --------------------------------------------------


def test_protocols_under_checkpoint_and_hooks(t: dict[str, Any]) -> None:
    """What is unpacked is another tensor than the one that carries .grad or main_grad."""
    x, w, y = t["x"], t["w"], t["y"]
    exact = weight_gradient(t)

    def cloned() -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda a: a.clone(), lambda a: a)

    def through_checkpoint(into: Any) -> Tensor:
        return checkpoint(lambda x: head(x, w, y, accumulate_into=into), x, use_reentrant=False)

    def through_hooks(into: Any) -> Tensor:
        with cloned():
            return head(x, w, y, accumulate_into=into)

    for run in (through_checkpoint, through_hooks):
        w.grad = None
        run("grad").backward()
        check(w.grad, exact, run, 1e-5)
        w.main_grad = torch.zeros(7, 5)
        run("main_grad").backward()
        check(w.main_grad, exact, run, 1e-5)


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
@pytest.mark.parametrize("way", [{"reduction": "none"}, {"accumulate_into": True}])
def test_weights_that_changed_since(t: dict[str, Any], name: str, way: dict[str, Any]) -> None:
    weights = torch.ones(7 if name == "weight" else 6)
    more = {k: t["buffer"] if v is True else v for k, v in way.items()}
    loss = head(t["x"], t["w"], t["y"], **{name: weights}, **more)
    weights.mul_(100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_a_denominator_that_changed_since(t: dict[str, Any]) -> None:
    x, w, y = t["x"], t["w"], t["y"]
    (want,) = torch.autograd.grad(head(x, w, y, denominator=6.0), x)
    for more in ({"accumulate_into": t["buffer"]}, {}):
        count = torch.tensor(6)
        loss = head(x, w, y, denominator=count, **more)
        count.fill_(600)
        (got,) = torch.autograd.grad(loss, x, create_graph=not more)
        check(got, want, more, 1e-5)


def test_autograd_sees_that_a_buffer_was_written(t: dict[str, Any]) -> None:
    buffer, p = torch.ones(7, 5), torch.ones(7, 5, requires_grad=True)
    product = (p * buffer).sum()
    head(t["x"], t["w"], t["y"], accumulate_into=buffer).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    product = (p * buffer).sum()
    mbkern.loss_and_grad(
        "linear_cross_entropy", t["x"].detach(), t["w"].detach(), t["y"], argnums=1,
        grad_out=buffer, accumulate=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_destinations_are_checked_again(t: dict[str, Any]) -> None:
    x, w, y = t["x"], t["w"], t["y"]
    w.main_grad = torch.zeros(7, 5)
    loss = head(x, w, y, accumulate_into="main_grad")
    w.main_grad = torch.zeros(35)
    with pytest.raises(ValueError, match="must be floating, of the weight's shape"):
        loss.backward()
    w.grad = w.detach()
    with pytest.raises(ValueError, match="overlaps another argument"):
        head(x, w, y, accumulate_into="grad")
    w.grad = None
    (w**3).sum().backward(create_graph=True)
    with pytest.raises(ValueError, match="requires grad"):
        head(x, w, y, accumulate_into="grad")
    w.grad = None
    buffer = t["buffer"]
    for name, value in (
        ("weight", buffer.view(-1)[:7]), ("sample_weight", buffer.view(-1)[:6]),
        ("denominator", buffer[0, 0]), ("logit_scale", buffer[0, 0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="overlaps another argument"):
            head(x, w, y, accumulate_into=buffer, **{name: value})
    with pytest.raises(ValueError, match="overlaps another argument"):
        mbkern.loss_and_grad(
            "linear_cross_entropy", x.detach(), w.detach(), y, argnums=1, grad_out=buffer,
            accumulate=True, weight=buffer.view(-1)[:7],
        )  # fmt: skip
    with pytest.raises(ValueError, match="linear_weight does not require grad"):
        head(x, w.detach(), y, accumulate_into=buffer)
    assert (buffer == 0).all()


def test_overwriting_happens_once_in_a_backward(t: dict[str, Any]) -> None:
    x, w, y = t["x"], t["w"], t["y"]
    w.overwrite_main_grad = True
    w.main_grad = torch.full((7, 5), 9.0)
    (head(x, w, y, accumulate_into="main_grad") + head(x, w, y, accumulate_into="main_grad")
     ).backward()  # fmt: skip
    check(w.main_grad, 2 * weight_gradient(t), "two heads of one weight", 1e-5)
    loss, stats = head(x, w, y, accumulate_into="main_grad", return_stats=True)
    (loss + stats.lse.sum()).backward()
    z = TF.linear(x, w)
    (want,) = torch.autograd.grad(TF.cross_entropy(z, y) + z.logsumexp(1).sum(), w)
    check(w.main_grad, want, "loss and log-sum-exp", 1e-5)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.int8, 128), (torch.int8, 300), (torch.uint8, 200), (torch.uint8, 256),
     (torch.uint8, 300), (torch.int16, 40000)],
)  # fmt: skip
def test_narrow_class_indices(dtype: torch.dtype, classes: int) -> None:
    """A class number, or ignore_index, that does not fit the targets' dtype."""
    x, w = torch.randn(6, 5), torch.randn(classes, 5)
    top = min(torch.iinfo(dtype).max, classes - 1)
    target = torch.tensor([0, 1, 5, min(156, top), top - 1, top])
    for more in ({}, {"ignore_index": 255 if dtype is torch.int8 else 3}):
        check(
            head(x, w, target.to(dtype), **more), TF.cross_entropy(TF.linear(x, w), target, **more),
            more, 1e-5,
        )  # fmt: skip
    if dtype is torch.int8:
        with pytest.raises(IndexError, match="target -1 of item 1"):
            head(x, w, torch.tensor([1, -1, 2, 3, 4, 5], dtype=dtype), ignore_index=255)


def test_positions_in_errors_are_the_callers(t: dict[str, Any]) -> None:
    y = t["y"].clone()
    y[:3], y[4] = -100, 99
    with pytest.raises(IndexError, match="target 99 of item 4"):
        head(t["x"], t["w"], y)


def test_a_tensor_as_scale_is_applied_before_the_rounding() -> None:
    """The gradient of the input is that of the same number, without a bias of its rounding."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=g).bfloat16().requires_grad_()
    w = torch.randn(100, 32, generator=g).bfloat16()
    y = torch.randint(100, (64,), generator=g)
    wide = x.detach().double().requires_grad_()
    TF.cross_entropy(TF.linear(wide, w.double()) * (100 / 3), y).backward()
    exact = wide.grad
    for scale in (100 / 3, torch.tensor(100 / 3)):
        loss = head(x, w, y, logit_scale=scale, split_invariant=True, grad_scale=1.0)
        (got,) = torch.autograd.grad(loss, x)
        bias = (got.double() * exact).sum() / exact.square().sum() - 1
        assert abs(bias) < 4e-4, scale


def test_a_scale_of_zero_hides_nothing(t: dict[str, Any]) -> None:
    x = t["x"].detach().clone()
    x[0, 0] = float("inf")
    for scale in (0.0, torch.tensor(0.0)):
        assert head(x, t["w"], t["y"], logit_scale=scale).isnan()


def test_an_infinite_incoming_gradient_spares_ignored_rows(t: dict[str, Any]) -> None:
    y = t["y"].clone()
    y[2] = -100
    for more in ({}, {"grad_scale": 2.0}, {"accumulate_into": t["buffer"]}):
        loss = head(t["x"], t["w"], y, **more)
        (got,) = torch.autograd.grad(loss, t["x"], torch.tensor(float("inf")))
        assert (got[2] == 0).all(), more
        assert not got[0].isfinite().all(), more


def test_biases_of_other_dtypes_and_layouts(t: dict[str, Any]) -> None:
    x, w, y = t["x"].detach(), t["w"].detach(), t["y"]
    b = torch.randn(14, dtype=torch.float64)[::2]
    want = TF.cross_entropy(TF.linear(x.double(), w.double(), b), y)
    for more in ({}, {"split_invariant": True}):
        check(head(x, w, y, linear_bias=b.float(), **more), want, more, 1e-5)
        check(head(x, w, y, linear_bias=b, **more), want, more, 1e-5)
        _, (dw, db) = mbkern.loss_and_grad(
            "linear_cross_entropy", x, w, y, b, argnums=(1, 3), accumulate=True,
            grad_out=(t["buffer"], torch.zeros(7).double()), **more,
        )  # fmt: skip
        assert dw is t["buffer"]
        assert db.dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        leaf = w.double().requires_grad_()
        head(x, leaf, y).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype is torch.float64


def test_memory_that_may_not_be_read(t: dict[str, Any]) -> None:
    x, w, y = t["x"].detach(), t["w"].detach(), t["y"].clone()
    negated = torch._neg_view(x)
    for more in ({}, {"split_invariant": True}):
        check(head(negated, w, y, **more), head(-x, w, y), "negated", 1e-6)
    y.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="target has no memory"):
        head(x, w, y)
    with pytest.raises(TypeError, match="only strided tensors"):
        head(x.to_sparse(), w, t["y"])


def test_sizes_of_zero() -> None:
    y = torch.randint(7, (6,))
    loss = head(torch.zeros(6, 0), torch.zeros(7, 0).requires_grad_(), y)
    check(loss, torch.tensor(7.0).log(), "no features", 1e-6)
    loss.backward()
    none = head(torch.zeros(6, 5), torch.zeros(7, 0, 5), torch.zeros(6, 0).long(), reduction="sum")
    assert none.item() == 0


def test_gradients_in_the_dtype_that_a_leaf_asks_for() -> None:
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("torch without grad_dtype")
    x, y = torch.randn(300, 8).bfloat16(), torch.randint(5, (300,))
    w = torch.randn(5, 8).bfloat16().requires_grad_()
    w.grad_dtype = torch.float32
    head(x, w, y).backward()
    assert w.grad is not None
    assert w.grad.dtype is torch.float32
    assert not torch.equal(w.grad, w.grad.bfloat16().float()), "rounded to 16 bits on the way"


# ---- settings ------------------------------------------------------------------------------------


def test_modules_with_inner_dimensions_accumulate(t: dict[str, Any]) -> None:
    module = mbkern.nn.LinearCrossEntropyLoss(5, 4, out_features=(3,), bias=True)
    x, y = t["x"], torch.randint(4, (6, 3))
    module(x, y).backward()
    want = module.linear.weight.grad
    module.linear.weight.grad = None
    module.accumulate_into = "grad"
    module(x, y).backward()
    check(module.linear.weight.grad, want, "grad", 1e-6)
    module.linear.weight.main_grad = torch.zeros(12, 5)
    module.accumulate_into = "main_grad"
    module(x, y).backward()
    check(module.linear.weight.main_grad, want, "main_grad", 1e-6)
    module.accumulate_into = torch.zeros(12, 5)
    module(x, y).backward()
    check(module.accumulate_into, want, "tensor", 1e-6)


def test_modes_do_not_bring_the_logits_back(t: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w, y = t["x"], t["w"], t["y"]
    want = torch.autograd.grad(head(x, w, y), [x, w])
    modes: list[Callable[[], Any]] = [
        lambda: torch.device("cpu"), lambda: FlopCounterMode(display=False),
        contextlib.nullcontext,
    ]  # fmt: skip
    for mode in modes:
        with torch.profiler.profile() as profile, mode():
            got = torch.autograd.grad(head(x, w, y, chunk_bytes=60), [x, w])
        shapes = {e.name for e in profile.events()}
        assert "aten::linear" not in shapes, "unfused"
        for a, b in zip(got, want, strict=True):
            check(a, b, mode, 1e-5)
    refused = pytest.raises(RuntimeError, match="dispatch and function modes")
    with FlopCounterMode(display=False), refused:
        head(x, w, y, accumulate_into=t["buffer"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_inductor_and_inputs_that_are_not_row_major() -> None:
    a, w = torch.randn(16, 24, requires_grad=True), torch.randn(40, 16)
    y = torch.randint(40, (24,))

    def of(a: Tensor) -> Tensor:
        return head((a * 1.5).t(), w, y)

    (want,) = torch.autograd.grad(of(a), a)
    (got,) = torch.autograd.grad(torch.compile(of)(a), a)
    check(got, want, "inductor", 1e-6)


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sample_weight": torch.ones(5)}, ValueError, r"sample_weight has shape \(5,\)"),
    ({"linear_bias": 3}, TypeError, "linear_bias must be a tensor, not int"),
    ({"linear_bias": torch.ones(7).int()}, TypeError, "linear_bias must be floating"),
    ({"ignore_index": 2.5}, TypeError, "ignore_index must be an integer, not 2.5"),
    ({"shift": 1.5}, TypeError, "shift must be an integer"),
    ({"options": "foo"}, TypeError, "options must be a torch.nn.LinearCrossEntropyOptions"),
    ({"grad_scale": 0.0, "reduction": "none"}, ValueError, "grad_scale must be finite"),
    ({"logit_scale": torch.ones((), dtype=torch.int64)}, ValueError, "floating 0-dim tensor"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), MISTAKES, ids=lambda v: str(v)[:30])
def test_mistakes(
    t: dict[str, Any], wrong: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        head(t["x"], t["w"], t["y"], **wrong)


def test_mistakes_of_loss_and_grad(t: dict[str, Any]) -> None:
    x, w, y = t["x"].detach(), t["w"].detach(), t["y"]
    for wrong, kind, message in (
        ({"grad_scale": 2.0}, TypeError, "has no option 'grad_scale'"),
        ({"loss_sum": 3}, TypeError, "loss_sum must be a LossSum, not int"),
        ({"argnums": (True,)}, ValueError, "argnums"),
    ):
        with pytest.raises(kind, match=message):
            mbkern.loss_and_grad("linear_cross_entropy", x, w, y, **wrong)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_a_bias_of_another_dtype_in_the_formula(
    t: dict[str, Any], dtype: torch.dtype, kind: torch.dtype
) -> None:
    """Second derivatives, transforms, many gradients at once: what one backward gives."""
    x, w = (t[name].detach().to(dtype).requires_grad_() for name in "xw")
    b, y = t["b"].detach().to(kind).requires_grad_(), t["y"]

    def of(x: Tensor, w: Tensor, b: Tensor, y: Tensor = y) -> Tensor:
        loss: Tensor = head(x, w, y, linear_bias=b)
        return loss

    def batched() -> Any:
        one = torch.ones(1, dtype=dtype)
        return [
            g[0] for g in torch.autograd.grad(of(x, w, b), [x, w, b], one, is_grads_batched=True)
        ]

    want = torch.autograd.grad(of(x, w, b), [x, w, b])
    shares = torch.nn.functional.one_hot(y, 7).to(dtype).requires_grad_()
    ways: list[Callable[[], Any]] = [
        lambda: torch.autograd.grad(of(x, w, b), [x, w, b], create_graph=True),
        lambda: torch.func.grad(of, (0, 1, 2))(x, w, b),
        batched,
        lambda: torch.autograd.grad(of(x, w, b, shares), [x, w, b]),
    ]
    for way in ways:
        for got, expected in zip(way(), want, strict=True):
            assert got.dtype is expected.dtype
            check(got, expected, dtype, 1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_rows_of_a_chunk_as_torch_counts_them() -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has had its options since 2.13")
    from mbkern._linear_call import LinearCall
    from mbkern._linear_options import linear_options

    t = Head(bias=False).tensors(torch.bfloat16)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8)
    for split in (False, True):
        head = linear_options(
            t["input"], t["linear_weight"], t["target"], None, options=options,
            split_invariant=split,
        )  # fmt: skip
        call = LinearCall(
            t["input"], t["linear_weight"], None, t["target"], None, head, torch.bfloat16
        )
        assert [b - a for a, b in call.chunks()] == [8, 8, 5]
    most = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=10**12)  # memory of so many rows
    assert torch.equal(F.linear_cross_entropy(**t, options=most), F.linear_cross_entropy(**t))
