"""Losses of rows of several tensors with everything around: memory, autograd, tracing, refusals."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, REDUCTIONS, check
from row_cases import KERNELS, ROW_CASES, RowCase, RowSample, Variation, direct
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import mbkern
from mbkern import _ops, loss_and_grad

pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize("case", ROW_CASES, ids=lambda case: case.name)
every_kernel = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
STOCK = [case for case in ROW_CASES if case.torch is not None]
every_stock_case = pytest.mark.parametrize("case", STOCK, ids=lambda case: case.name)
CASE = {case.name: case for case in ROW_CASES}
HALF = (torch.bfloat16, torch.float16)


def shapes(case: RowCase) -> tuple[tuple[int, ...], ...]:
    return ((6, 70), (9, 5), (2, 90, 3)) if case.images else ((6, 70), (9, 5))


def through_autograd(case: RowCase, sample: RowSample, **options: Any) -> list[Tensor]:
    """Loss, and the gradients of its sum."""
    sample, leaves = case.leaves(sample)
    loss = case.function(**sample.tensors, **sample.options, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def usable(case: RowCase, reduction: str = "mean") -> Iterator[Variation]:
    for variation in case.variations:
        if reduction == "mean" or "denominator" not in variation.options:
            yield variation


# ---- loss_and_grad and memory --------------------------------------------------------------------


@every_kernel
def test_loss_and_grad(case: RowCase) -> None:
    """The bits of autograd; whatever is asked for, by number or name, in its order."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        for variation, shape in itertools.product(usable(case, reduction), shapes(case)):
            sample = case.sample(shape, dtype, variation)
            want = through_autograd(case, sample, reduction=reduction)
            tensors, options = direct(case, sample)
            options["reduction"] = reduction
            loss, grads = loss_and_grad(case.name, *tensors, **options, argnums=case.inputs)
            label = f"{variation.name} {dtype} {reduction} {shape}"
            for got, w in zip((loss, *grads), want, strict=True):
                assert got.dtype is w.dtype
                assert torch.equal(got.nan_to_num(), w.nan_to_num()), label
    for count in range(1, len(case.inputs) + 1):
        for names in itertools.permutations(case.inputs, count):
            numbers = tuple(map(case.inputs.index, names))
            for argnums in (names, numbers, (*numbers[:1], *names[1:])):
                _, some = loss_and_grad(case.name, *tensors, **options, argnums=argnums)
                for name, got in zip(names, some, strict=True):
                    assert torch.equal(got, grads[case.inputs.index(name)])
        _, one = loss_and_grad(case.name, *tensors, **options, argnums=names[0])
        assert torch.equal(one, grads[case.inputs.index(names[0])])


@every_kernel
def test_grad_out(case: RowCase) -> None:
    """The caller's memory of any layout, also that of the tensors themselves."""
    for dtype, shape in itertools.product(DTYPES, shapes(case)):
        tensors, options = direct(case, case.sample(shape, dtype))
        call = functools.partial(loss_and_grad, case.name, argnums=case.inputs, **options)
        loss, want = call(*tensors)
        count = len(want)
        gaps = torch.full((count, *shape, 2), float("nan"), dtype=dtype)
        flat = torch.full((count, *shape), float("nan"), dtype=dtype)
        for outs in (
            tuple(flat), tuple(flat.mT.contiguous().mT), tuple(gaps[..., 1]),
            (None, *flat[1:].clone()), (*flat[1:].clone(), None),
        ):  # fmt: skip
            got, grads = call(*tensors, grad_out=outs)
            assert torch.equal(got, loss)
            for out, grad, w in zip(outs, grads, want, strict=True):
                assert out is None or out.data_ptr() == grad.data_ptr()
                assert torch.equal(grad, w), (dtype, shape)
        assert gaps[..., 0].isnan().all(), "what lies between the elements was written"
        copies = [t.clone() for t in tensors]
        versions = [t._version for t in copies]
        got, _ = call(*copies, grad_out=tuple(copies[:count]))
        assert torch.equal(got, loss)
        for copy, w, version in zip(copies, want, versions, strict=False):
            assert torch.equal(copy, w), f"over the tensors: {dtype} {shape}"
            assert copy._version > version, "an earlier save must notice"


@every_kernel
def test_accumulate(case: RowCase) -> None:
    """buffer + gradient in the type computed in, one rounding an element, bit by bit."""
    random = torch.Generator().manual_seed(3)
    for variation, dtype, shape in itertools.product(case.variations, DTYPES, shapes(case)):
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        sample = case.sample(shape, dtype, variation)
        tensors, options = direct(case, sample)
        wide, wide_options = direct(case, sample.to(compute))
        more: dict[str, Any] = {"argnums": case.inputs, "scale": -0.3}
        _, grads = loss_and_grad(case.name, *wide, **wide_options, **more)
        start = torch.randn(len(grads), *shape, generator=random, dtype=compute)
        flat = torch.full((*start.shape, 2), float("nan"), dtype=compute)
        for buffers in (start.clone(), flat[..., 0].copy_(start), start.mT.contiguous().mT):
            outs = tuple(buffers)
            loss_and_grad(case.name, *tensors, **options, **more, accumulate=True, grad_out=outs)
            for out, begin, grad in zip(outs, start, grads, strict=True):
                assert torch.equal(out, begin + grad), f"{variation.name} {dtype} {shape}"
        assert flat[..., 1].isnan().all(), "what lies between the elements was written"
        _, fresh = loss_and_grad(case.name, *tensors, **options, **more, accumulate=True)
        for got, grad in zip(fresh, grads, strict=True):
            assert torch.equal(got, torch.zeros_like(grad) + grad)


@every_case
def test_inplace(case: RowCase) -> None:
    """The first gradient is written over the first tensor, with the bits of one out of place."""
    first = case.inputs[0]
    for dtype, reduction, shape in itertools.product(DTYPES, REDUCTIONS, shapes(case)):
        for hint in (None, 2.0):
            sample, _ = case.leaves(case.sample(shape, dtype))
            logits = sample.tensors[first] + 0
            seen = sample.of(**{first: logits}).tensors
            options = {"reduction": reduction, "grad_scale": hint}
            plain = case.function(**seen, **options)
            (want,) = torch.autograd.grad(plain.sum() * 2, logits)
            loss = case.function(**seen, **options, inplace=True)
            (grad,) = torch.autograd.grad(loss.sum() * 2, logits)
            assert torch.equal(loss, plain)
            assert torch.equal(grad, want), (dtype, reduction, shape, hint)
            assert grad.data_ptr() == logits.data_ptr()


@every_kernel
def test_numpy(case: RowCase) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        tensors, options = direct(case, case.sample((6, 70), dtype))
        want = loss_and_grad(case.name, *tensors, **options, argnums=case.inputs)
        arrays = [t.numpy().copy() for t in tensors]
        loss, grads = loss_and_grad(case.name, *arrays, **options, argnums=case.inputs)
        assert isinstance(loss, np.ndarray)
        assert np.array_equal(loss, want[0].numpy())
        for got, w in zip(grads, want[1], strict=True):
            assert isinstance(got, np.ndarray)
            assert np.array_equal(got, w.numpy())


# ---- autograd ------------------------------------------------------------------------------------


@every_case
def test_gradients_where_they_are_needed(case: RowCase) -> None:
    """Every set of tensors that require grad: those have a gradient, with the same bits."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        sample = case.sample((6, 70), dtype)
        _, *want = through_autograd(case, sample, reduction=reduction)
        for needs in itertools.product((False, True), repeat=len(case.inputs)):
            leaves = {
                n: sample.tensors[n].clone().requires_grad_(need)
                for n, need in zip(case.inputs, needs, strict=True)
            }
            loss = case.function(**sample.of(**leaves).tensors, reduction=reduction).sum()
            assert loss.requires_grad == any(needs)
            if any(needs):
                loss.backward()
            for leaf, need, w in zip(leaves.values(), needs, want, strict=True):
                assert (leaf.grad is None) == (not need)
                assert leaf.grad is None or torch.equal(leaf.grad, w), (needs, dtype)


def of_leaves(
    case: RowCase, function: Callable[..., Tensor], sample: RowSample, **more: Any
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of its differentiable tensors, and these."""
    sample, leaves = case.leaves(sample)

    def call(*values: Tensor) -> Tensor:
        tensors = sample.of(**dict(zip(case.inputs, values, strict=True))).tensors
        return function(**tensors, **sample.options, **more)

    return call, leaves


@every_case
def test_gradcheck(case: RowCase) -> None:
    for reduction in ("none", "mean"):
        for variation in usable(case, reduction):
            if (variation.name, reduction) == ("all ignored", "mean"):
                continue  # NaN
            sample = case.sample((3, 5), torch.float64, variation, seed=2)
            call, leaves = of_leaves(case, case.function, sample, reduction=reduction)
            assert torch.autograd.gradcheck(call, leaves, fast_mode=True), variation.name
            if variation.name in ("plain", "everything", "swap", "reverse"):
                call, leaves = of_leaves(case, case.function, sample, reduction=reduction)
                assert torch.autograd.gradcheck(call, leaves), variation.name


@every_case
def test_second_derivatives(case: RowCase) -> None:
    """Those of the formula, through everything that has a gradient."""
    for dtype, reduction in itertools.product((torch.float64, torch.bfloat16), REDUCTIONS):
        for variation in usable(case, reduction):
            sample = case.sample((4, 6), dtype, variation, seed=3)
            results = []
            for function, seen in (
                (case.function, sample), (case.reference, sample.to(torch.float64)),
            ):  # fmt: skip
                call, leaves = of_leaves(case, function, seen, reduction=reduction)
                grads = torch.autograd.grad(call(*leaves).sum(), leaves, create_graph=True)
                total = sum((g.double().square()).sum() for g in grads)
                second = (
                    torch.autograd.grad(total, leaves, allow_unused=True)
                    if total.requires_grad
                    else [None] * len(leaves)
                )
                zeros = [torch.zeros_like(leaf) for leaf in leaves]
                results.append(
                    [*grads, *(z if s is None else s for s, z in zip(second, zeros, strict=True))]
                )
            for got, want in zip(*results, strict=True):
                # Sixteen bits: the gradients that enter are rounded, and p - 1 cancels.
                tolerance = 64 * torch.finfo(dtype).eps * (want.detach().abs().max() + 0.1)
                difference = (got.double() - want).abs().max()
                assert difference <= tolerance, f"{variation.name} {reduction} {dtype}"


@every_case
def test_retain_graph(case: RowCase) -> None:
    """Each backward has its own factor; the one after the last retained raises."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        sample = case.sample((6, 70), dtype)
        call, leaves = of_leaves(case, case.function, sample, reduction=reduction)
        want = {k: torch.autograd.grad(call(*leaves).sum() * k, leaves) for k in (2, -4)}
        total = call(*leaves).sum()
        first = torch.autograd.grad(total * 2, leaves, retain_graph=True)
        second = torch.autograd.grad(total * -4, leaves)
        assert all(map(torch.equal, first, want[2])), (dtype, reduction)
        assert all(map(torch.equal, second, want[-4])), (dtype, reduction)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(total, leaves)


@every_case
def test_grad_scale(case: RowCase) -> None:
    """Of 16-bit gradients that would vanish without it, as a scaler multiplies the loss."""
    scale = 2.0**14
    for dtype, given in itertools.product(HALF, (scale, torch.tensor(scale))):
        sample = case.sample((70, 30), dtype)
        more = {"denominator": 1e6, "loss_dtype": torch.float32}
        results = []
        for function, seen, options in (
            (case.function, sample, {"grad_scale": given, **more}),
            (case.function, sample, more),
            (case.reference, sample.to(torch.float64), {"denominator": 1e6}),
        ):
            call, leaves = of_leaves(case, function, seen, **options)
            results.append(torch.autograd.grad(call(*leaves) * scale, leaves))
        incoming = torch.tensor(scale, dtype=torch.float64)
        sizes = case.sizes(
            RowSample(sample.to(torch.float64).tensors, {"denominator": 1e6}), incoming, "mean"
        )[1:]
        sizes += (0.0,) * 3
        for got, plain, want, size in zip(*results, sizes, strict=False):
            check(got, want, None, f"{case.name} {dtype}", size)
            check(plain, want, None, f"{case.name} {dtype} without a hint", size)
            assert got.abs().max() > 0


@every_case
def test_autocast_and_modes(case: RowCase) -> None:
    """16-bit tensors give an fp32 loss under autocast; without grad the bits are the same."""
    for dtype, reduction in itertools.product(HALF, REDUCTIONS):
        sample = case.sample((6, 70), dtype)
        with torch.autocast("cpu", dtype):
            got = through_autograd(case, sample, reduction=reduction)
        want = through_autograd(case, sample, reduction=reduction, loss_dtype=torch.float32)
        assert got[0].dtype is torch.float32
        assert all(map(torch.equal, got, want))
        sample, _ = case.leaves(sample)
        plain = case.function(**sample.tensors, reduction=reduction)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                loss = case.function(**sample.tensors, reduction=reduction)
            assert not loss.requires_grad
            assert torch.equal(loss, plain)


@every_case
def test_lost_gradients_are_refused(case: RowCase) -> None:
    """Weights, denominators and labels that require grad."""
    sample, _ = case.leaves(case.sample((6, 70)))
    for name, value in (("sample_weight", torch.ones(6)), ("denominator", torch.tensor(3.0))):
        value.requires_grad_()
        with pytest.raises(NotImplementedError, match="no gradient is computed for weights"):
            case.function(**sample.tensors, **{name: value})
        with torch.no_grad():
            case.function(**sample.tensors, **{name: value})
    if case.name == "cosine_embedding_loss":
        target = sample.tensors["target"].detach().requires_grad_()
        with pytest.raises(NotImplementedError, match="computes no gradient for target"):
            case.function(**sample.of(target=target).tensors)
        with torch.no_grad():
            case.function(**sample.of(target=target).tensors)


# ---- tracing -------------------------------------------------------------------------------------

TARGETS = (  # a class, a list, a number, none, one that may be left out
    "nll_loss", "multilabel_margin_loss", "cosine_embedding_loss", "triplet_margin_loss",
    "kl_div_with_logits",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("name", ["kl_div_with_logits", "cosine_embedding_loss"])
def test_compile(name: str) -> None:
    """No graph after that of the first batch size, and the bits of an eager call."""
    case = CASE[name]
    graphs: list[Any] = []
    counts = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(case.function, fullgraph=True, backend=backend, dynamic=True)
    for items in (4, 7, 12):
        sample = case.sample((items, 20))
        want = through_autograd(case, sample)
        leaves_of, leaves = case.leaves(sample)
        loss = compiled(**leaves_of.tensors)
        got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        assert all(map(torch.equal, got, want)), items
        counts.append(len(graphs))
    assert counts[-1] == counts[0]
    torch._dynamo.reset()


@every_case
def test_transforms(case: RowCase) -> None:
    """vmap over batches, and grad: each has the results of a call of its own."""
    samples = [case.sample((5, 9), seed=k) for k in range(3)]
    stacked = {n: torch.stack([s.tensors[n] for s in samples]) for n in samples[0].tensors}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return case.function(**tensors)

    def loss_of(inputs: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
        return loss(inputs | rest)

    want = [through_autograd(case, s) for s in samples]
    got = torch.func.vmap(loss)(stacked)
    torch.testing.assert_close(got, torch.stack([w[0] for w in want]))
    inputs, rest = (
        {n: t for n, t in stacked.items() if (n in case.inputs) == of} for of in (True, False)
    )
    many = torch.func.vmap(torch.func.grad(loss_of))(inputs, rest)
    for k, w in enumerate(want):
        alone = torch.func.grad(loss_of)(
            {n: t[k] for n, t in inputs.items()}, {n: t[k] for n, t in rest.items()}
        )
        for name, grad in zip(case.inputs, w[1:], strict=True):
            torch.testing.assert_close(many[name][k], grad)
            torch.testing.assert_close(alone[name], grad)


@every_case
def test_fake_tensors(case: RowCase) -> None:
    """Shapes, dtypes and strides without data."""
    for dtype, reduction, shape in itertools.product(DTYPES, REDUCTIONS, shapes(case)):
        sample = case.sample(shape, dtype)
        want = through_autograd(case, sample, reduction=reduction)
        with FakeTensorMode() as mode:
            fake = {n: mode.from_tensor(t) for n, t in sample.tensors.items()}
            got = through_autograd(case, RowSample(fake, {}), reduction=reduction)
        for g, w in zip(got, want, strict=True):
            assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("reduction", "form"), [("none", False), ("mean", True)])
def test_operators(name: str, reduction: str, form: bool) -> None:
    """The checks of torch.library, for every kind of target."""
    case = CASE[name]
    (loss,) = (loss for loss in mbkern.losses() if loss.name == name)
    for dtype, grad in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        sample = case.sample((5, 7), dtype)
        leaves = [sample.tensors[n].requires_grad_(grad) for n in case.inputs]
        inputs = (*leaves, None, None)[:3]
        needs = [form and t is not None for t in inputs]
        target = sample.tensors.get("target", torch.arange(5) if loss.target == "index" else None)
        weight = torch.rand(7) if loss.weight == "classes" else None
        tensors = (*inputs, target, weight, torch.rand(5))
        options = (name, reduction, 3, loss.numbers())
        hint = torch.tensor(2.0) if form else None
        arguments = (*tensors, None, hint, *options, *needs, dtype)
        assert set(opcheck(_ops.tensor_loss, arguments).values()) == {"SUCCESS"}
        if grad:
            continue
        value, divisor = _ops.tensor_loss(*arguments)
        backward = (torch.full_like(value, 0.5), *tensors, hint, divisor, *options, form)
        every = [t is not None for t in inputs]
        assert set(opcheck(_ops.tensor_loss_backward, (*backward, *every)).values()) == {"SUCCESS"}


# ---- refusals ------------------------------------------------------------------------------------

INDEXED = [case for case in ROW_CASES if case.name in (
    "nll_loss", "multi_margin_loss", "softmax_focal_loss", "info_nce_loss"
)]  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("case", INDEXED, ids=lambda case: case.name)
def test_bad_classes(case: RowCase, isa: str) -> None:
    """The message has the row and the value, and nothing is written."""
    for dtype, columns, bad in itertools.product(DTYPES, (5, 70, 1100), (-1, None, 2**40)):
        value = columns if bad is None else bad
        sample = case.sample((9, columns), dtype)
        target = sample.tensors["target"].clone()
        target[6], target[8] = value, value
        bad_sample = sample.of(target=target)
        seen, _ = case.leaves(bad_sample)
        with pytest.raises(IndexError, match=f"target {value} at flat index 6"):
            case.function(**seen.tensors)
        if case.registered:
            out = torch.full((9, columns), 7.0, dtype=dtype)
            tensors, _ = direct(case, bad_sample)
            total = mbkern.LossSum()
            more = {"loss_sum": total} if dtype is not torch.float64 else {}
            with pytest.raises(IndexError, match=f"target {value} at flat index 6"):
                loss_and_grad(case.name, *tensors, grad_out=out, **more)
            assert (out == 7).all()
            assert not total.state.any()


@pytest.mark.cpu
def test_bad_lists(isa: str) -> None:
    case = CASE["multilabel_margin_loss"]
    for columns, bad in itertools.product((5, 70, 1100), (-2, None, 2**40)):
        value = columns if bad is None else bad
        sample = case.sample((9, columns))
        target = torch.full((9, columns), -1)
        target[:, 0] = 2
        target[6, 1] = value
        out = torch.full((9, columns), 7.0)
        with pytest.raises(IndexError, match=rf"{value} at (flat index {6 * columns + 1}|row 6)\b"):
            loss_and_grad(case.name, sample.tensors["input"], target, grad_out=out)
        assert (out == 7).all()
        with pytest.raises((IndexError, RuntimeError)):  # torch's too
            F.multilabel_margin_loss(sample.tensors["input"], target)


@every_case
def test_wrong_tensors(case: RowCase) -> None:
    """Values and shapes are in the messages."""
    sample = case.sample((6, 70))
    refused = (ValueError, TypeError, RuntimeError, IndexError)
    for name in case.inputs:
        t = sample.tensors[name]
        for wrong in (t[:4], t[:, :3], t[..., None], t[0, 0], t.to(torch.complex64)):
            if case.name == "entropy_with_logits" and wrong.dim() and not wrong.is_complex():
                continue  # alone, these are right
            with pytest.raises(refused, match=r"^mbkern: "):
                case.function(**sample.of(**{name: wrong}).tensors)
    target = sample.tensors.get("target", torch.arange(6))
    if case.inputs[-1] not in ("target", "negative"):
        for wrong in (target[:4], target[None], target.to(torch.complex64)):
            with pytest.raises(refused, match=r"^mbkern: "):
                case.function(**sample.of(target=wrong).tensors)
    for name, value in (("sample_weight", torch.ones(7)), ("denominator", torch.ones(3))):
        with pytest.raises(refused, match=r"^mbkern: "):
            case.function(**sample.tensors, **{name: value})
    with pytest.raises(TypeError, match="weird"):
        case.function(**sample.tensors, weird=1)
    for reduction in ("average", "batchmean"):
        with pytest.raises(ValueError, match="is not a valid reduction"):
            case.function(**sample.tensors, reduction=reduction)
    with pytest.raises(ValueError, match="denominator goes with reduction='mean'"):
        case.function(**sample.tensors, reduction="sum", denominator=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("triplet_margin_loss", {"p": 3}, "p = 2 only, not 3"),
        ("triplet_margin_loss", {"p": 1.0}, "p = 2 only, not 1.0"),
        ("multi_margin_loss", {"p": 3}, "p must be in .1, 2., not 3"),
        ("multi_margin_loss", {"p": 1.5}, "p must be 1 or 2, not 1.5"),
        ("multi_margin_loss", {"weight": torch.ones(3)}, "weight"),
        ("nll_loss", {"weight": torch.ones(3)}, "weight"),
        ("dice_loss", {"smooth": -1.0}, "smooth must be"),
        ("softmax_focal_loss", {"gamma": -1.0}, "gamma must be"),
        ("js_div_with_logits", {"beta": 1.5}, "beta must be"),
        ("js_div_with_logits", {"beta": -0.1}, "beta must be"),
        ("kl_div_with_logits", {"direction": "backward"}, "direction must be 'forward' or 'rev"),
        *(
            (case.name, {"temperature": value}, "temperature must be")
            for case in ROW_CASES
            for value in (0.0, -1.0, float("nan"))
            if any("temperature" in v.options for v in case.variations)
        ),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASE[name].function(**CASE[name].sample((6, 70)).tensors, **options)


def test_info_nce_without_a_target() -> None:
    """Key i belongs to query i; more queries than keys need a target."""
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    got = mbkern.functional.info_nce_loss(x, temperature=0.1)
    torch.testing.assert_close(got, F.cross_entropy(x / 0.1, torch.arange(5)))
    with pytest.raises(ValueError, match="9 queries have only 5 keys"):
        mbkern.functional.info_nce_loss(x.T)
    for wrong in (x[0], x[None]):
        with pytest.raises(ValueError, match="similarity must be"):
            mbkern.functional.info_nce_loss(wrong)


# ---- modules and torch's samples -----------------------------------------------------------------


@every_case
def test_modules(case: RowCase) -> None:
    """A constructor's options reach the function; tensors come with the call."""
    for variation in case.variations:
        sample = case.sample((6, 9), torch.float32, variation)
        options = dict(sample.options)
        later = {n: options.pop(n) for n in ("sample_weight", "target") if n in options}
        module = case.module(**options, loss_dtype=torch.float64)
        got = module(*sample.tensors.values(), **later)
        want = case.function(**sample.tensors, **sample.options, loss_dtype=torch.float64)
        assert got.dtype is torch.float64
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), variation.name


OPS = {
    op.name: op for op in op_db if op.name.startswith("nn.functional.") and not op.variant_test_name
}
MODULES = {info.module_cls: info for info in module_db}
Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


def with_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A detached copy, floating tensors in another dtype."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    return value.to(dtype) if value.is_floating_point() else value


def samples(case: RowCase, dtype: torch.dtype) -> list[tuple[str, Call, Call]]:
    """Every OpInfo and ModuleInfo sample as (description, our call, torch's call)."""
    torch.manual_seed(0)
    random.seed(0)
    calls: list[tuple[str, Call, Call]] = []
    op = OPS.get(f"nn.functional.{case.name}")
    entries = op.sample_inputs("cpu", torch.float64) if op is not None else ()
    for sample in entries:
        args = tuple(with_dtype(a, dtype) for a in (sample.input, *sample.args))
        kwargs = {k: with_dtype(v, dtype) for k, v in sample.kwargs.items()}
        text = f"{case.name}{[tuple(a.shape) for a in args]} {list(kwargs)}"
        calls.append((text, (case.function, args, kwargs), (case.torch, args, kwargs)))
    stock_class = next(c for c in case.module.__mro__ if c.__module__.startswith("torch."))
    info = MODULES.get(stock_class)  # there is none of TripletMarginLoss
    modules = (
        info.module_inputs_func(info, "cpu", torch.float32, False, training=True) if info else ()
    )
    for entry in modules:
        make, call = entry.constructor_input, entry.forward_input
        options = {k: with_dtype(v, dtype) for k, v in make.kwargs.items()}
        args = tuple(with_dtype(a, dtype) for a in call.args)
        text = f"{case.module.__name__} {entry.desc} {[tuple(a.shape) for a in args]}"
        mine, stock = (cls(*make.args, **options) for cls in (case.module, stock_class))
        calls.append((text, (mine, args, call.kwargs), (stock, args, call.kwargs)))
    return calls


def results(call: Call, dtype: torch.dtype) -> list[Tensor | None]:
    """Loss, and gradients of the floating tensors from an incoming gradient of small integers."""
    function, args, kwargs = call
    if isinstance(function, torch.nn.Module):
        function = function.to(dtype)
    kwargs = {k: with_dtype(v, dtype) for k, v in kwargs.items()}
    leaves = [with_dtype(a, dtype) for a in args]
    count = {"cosine_embedding_loss": 2}.get(getattr(function, "__name__", ""), len(leaves))
    count = 2 if isinstance(function, torch.nn.CosineEmbeddingLoss) else count
    leaves = [a.requires_grad_(k < count and a.is_floating_point()) for k, a in enumerate(leaves)]
    loss = function(*leaves, **kwargs)
    incoming = torch.arange(loss.numel()).reshape(loss.shape) % 5 - 1
    loss.backward(incoming.to(loss.dtype) + (loss.dim() == 0) * 2)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@every_stock_case
def test_torch_samples(case: RowCase, dtype: torch.dtype) -> None:
    """In the dtypes that torch's function has; p other than 2 is refused."""
    count = 0
    for text, mine, stock in samples(case, dtype):
        p = mine[2].get("p", getattr(mine[0], "p", 2))
        if case.name == "triplet_margin_loss" and p != 2:
            with pytest.raises(ValueError, match="p = 2 only"):
                results(mine, dtype)
            continue
        weight = mine[2].get("weight")
        by_element = "soft_margin" in case.name and weight is not None and weight.dim() != 1
        one = case.name == "multi_margin_loss" and mine[1][0].dim() == 1 == mine[1][1].dim()
        if mine[1][0].dim() == 0 or by_element or one:  # no row, weights of elements, (C) with (1)
            message = r"^mbkern: .* (of rows|one entry for each|has shape \(1,\))"
            with pytest.raises(ValueError, match=message):
                results(mine, dtype)
            continue
        try:
            theirs = results(stock, dtype)
        except RuntimeError as error:
            assert "not implemented for" in str(error), text  # noqa: PT017
            continue
        count += 1
        got, want = results(mine, dtype), results(stock, torch.float64)
        magnitude = 2 + max(a.abs().max().item() if a.numel() else 0 for a in mine[1])
        for k, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
            assert (g is None) == (t is None), f"{text}: gradient {k} is {g}"
            if g is not None and w is not None:
                check(g, w, t, f"{text} {dtype}: {k}", magnitude)
    assert count >= 6 or dtype in HALF, count


# ---- patched() -----------------------------------------------------------------------------------


@every_stock_case
def test_patched(case: RowCase) -> None:
    """Torch's functions run here where the call is the same, and the report says so."""
    function = getattr(F, case.name)
    for variation in case.variations:
        if not variation.torch:
            continue
        sample = case.sample((6, 9), torch.float32, variation)
        want = through_autograd(case, sample)
        leaves_of, leaves = case.leaves(sample)
        with mbkern.patched(report=True) as report:
            loss = getattr(F, case.name)(**leaves_of.tensors, **sample.options)
        got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        assert report.taken == {case.name: 1}, f"{variation.name}: {report}"
        assert all(map(torch.equal, (t.nan_to_num() for t in got), (t.nan_to_num() for t in want)))
    assert getattr(F, case.name) is function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_stock_case
def test_patched_samples(case: RowCase, dtype: torch.dtype) -> None:
    """Every sample of torch's tests has torch's result, by whichever library."""
    count = 0
    with mbkern.patched(report=True) as report:
        for text, _, (function, args, kwargs) in samples(case, dtype):
            named = getattr(function, "__name__", "")
            called = getattr(F, case.name) if named == case.name else function
            got = results((called, args, kwargs), dtype)
            with torch._C.DisableTorchFunction():
                want = results((function, args, kwargs), torch.float64)
            for g, w in zip(got, want, strict=True):
                assert (g is None) == (w is None), text
                if g is not None and w is not None:
                    torch.testing.assert_close(g, w.to(dtype), equal_nan=True, msg=text)
            count += 1
    assert report.taken[case.name] >= count / 4, str(report)


@every_stock_case
def test_patched_passes_on(case: RowCase) -> None:
    """What torch has and mbkern has not, and what torch refuses: torch's own results and errors."""
    function = getattr(F, case.name)
    sample = case.sample((6, 9))
    calls: list[dict[str, Any]] = [{case.inputs[0]: sample.tensors[case.inputs[0]][:4]}]
    if case.name == "triplet_margin_loss":
        calls += [{"p": 1.0}, {"p": 3.0}]
    if case.name == "multilabel_soft_margin_loss":
        calls += [{n: torch.rand(2, 3, 4) for n in case.inputs}]
    if "target" in sample.tensors and not sample.tensors["target"].is_floating_point():
        calls += [{"target": sample.tensors["target"] + 90}]
    for change in calls:
        outcomes = []
        for patch in (False, True):
            with mbkern.patched(report=True) as report:
                called = getattr(F, case.name) if patch else function
                try:
                    outcomes.append(called(**sample.tensors | change))
                except Exception as error:
                    outcomes.append((type(error), str(error)))
        assert not report.taken, f"{list(change)}: {report}"
        if isinstance(outcomes[0], Tensor):
            assert torch.equal(*outcomes)
        else:
            assert outcomes[0] == outcomes[1]
