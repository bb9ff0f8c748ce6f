"""Losses of rows of several tensors with everything around: memory, autograd, tracing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, REDUCTIONS, check
from row_calls import (
    CASE,
    HALF,
    every_case,
    every_kernel,
    shapes,
    through_autograd,
    usable,
)
from row_case import RowCase, RowSample
from row_cases import direct
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

import mbkern
from mbkern import _ops, loss_and_grad

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """Weights and denominators that require grad."""
    sample, _ = case.leaves(case.sample((6, 70)))
    for name, value in (("sample_weight", torch.ones(6)), ("denominator", torch.tensor(3.0))):
        value.requires_grad_()
        with pytest.raises(NotImplementedError, match="no gradient is computed for weights"):
            case.function(**sample.tensors, **{name: value})
        with torch.no_grad():
            case.function(**sample.tensors, **{name: value})
    if case.name == "cosine_embedding_loss":
        target = sample.tensors["target"].detach().requires_grad_()
        loss = case.function(**sample.of(target=target).tensors)  # only compared, as in torch
        assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)


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
    """Torch's checks of operators, for every kind of target."""
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
        assert set(library.opcheck(_ops.tensor_loss, arguments).values()) == {"SUCCESS"}
        if grad:
            continue
        value, divisor = _ops.tensor_loss(*arguments)
        backward = (torch.full_like(value, 0.5), *tensors, hint, divisor, *options, form)
        every = [t is not None for t in inputs]
        assert set(library.opcheck(_ops.tensor_loss_backward, (*backward, *every)).values()) == {
            "SUCCESS"
        }
