"""mbkern.loss_and_grad: loss and gradient in one call, into memory of the caller's."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, REDUCTIONS, Case, Sample, Variation
from torch import Tensor

from mbkern import LossSum, loss_and_grad

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
TRIPLES = [case for case in CASES if len(case.differentiable) == 3]
PAIRS = [case for case in CASES if case.differentiable == ("input", "target")]
NARROW = DTYPES[:3]
SHAPES = ((6, 70), (9, 5), (2, 300, 3), (40,))


def run(case: Case, sample: Sample, **options: Any) -> tuple[Any, Any]:
    """loss_and_grad of a sample."""
    return loss_and_grad(case.name, sample.input, sample.target, **sample.options | options)


def through_autograd(case: Case, sample: Sample, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradients; of the sum for reduction none."""
    sample, leaves = case.leaves(sample)
    loss = case.function(sample.input, sample.target, **sample.options | options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values()))


@every_case
def test_same_bits_as_autograd(case: Case) -> None:
    """Every option and reduction; the gradient is that of a plain call."""
    for variation, dtype, reduction in itertools.product(case.variations, case.dtypes, REDUCTIONS):
        for shape in SHAPES:
            s = case.sample(shape, dtype, variation)
            loss, grad, *_ = through_autograd(case, s, reduction=reduction)
            got = run(case, s, reduction=reduction)
            label = f"{variation.name} {dtype} {reduction} {shape}"
            assert got[0].dtype is loss.dtype, label
            assert torch.equal(got[0].nan_to_num(), loss.nan_to_num()), label
            assert torch.equal(got[1], grad), label


@every_case
def test_argnums(case: Case) -> None:
    """An index, a name, or a tuple of them; the gradients come in the same structure."""
    s = case.sample((6, 70), torch.float32)
    _, *grads = through_autograd(case, s)
    first = case.arguments[0]
    for argnums in (0, first, (0,), (first,)):
        _, got = run(case, s, argnums=argnums)
        assert isinstance(got, tuple) == isinstance(argnums, tuple)
        assert torch.equal(got[0] if isinstance(got, tuple) else got, grads[0])
    if case in PAIRS:
        for argnums in (
            1,
            "target",
            (1,),
            (0, 1),
            ("target", 0),
            ("input", "target"),
            (1, "input"),
        ):
            _, got = run(case, s, argnums=argnums)
            wanted = argnums if isinstance(argnums, tuple) else (argnums,)
            got = got if isinstance(argnums, tuple) else (got,)
            assert len(got) == len(wanted)
            for arg, grad in zip(wanted, got, strict=True):
                assert torch.equal(grad, grads[arg in (1, "target")]), argnums
    if len(case.differentiable) == 3:
        _, b, c = case.arguments
        for argnums in (2, c, (0, 1, 2), (c, 0, b), (2, 1)):
            _, got = run(case, s, argnums=argnums)
            wanted = argnums if isinstance(argnums, tuple) else (argnums,)
            got = got if isinstance(argnums, tuple) else (got,)
            for arg, grad in zip(wanted, got, strict=True):
                number = arg if isinstance(arg, int) else case.arguments.index(arg)
                assert torch.equal(grad, grads[number]), argnums


PROBABILITIES = [v for v in CASES[0].variations if "probabilities" in v.name]


@pytest.mark.parametrize("variation", PROBABILITIES, ids=lambda v: v.name)
def test_class_probabilities(variation: Variation) -> None:
    """Their gradient is autograd's, into whatever memory, beside that of the input or alone."""
    case = CASES[0]
    for dtype, reduction, shape in itertools.product(DTYPES, REDUCTIONS, ((6, 70), (2, 30, 3))):
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        s = case.sample(shape, dtype, variation)
        loss, *want = through_autograd(case, s, reduction=reduction)
        for argnums in (1, "target", (1,), (0, 1), ("target", "input")):
            got, grads = run(case, s, argnums=argnums, reduction=reduction)
            assert torch.equal(got, loss)
            which = argnums if isinstance(argnums, tuple) else (argnums,)
            grads = grads if isinstance(argnums, tuple) else (grads,)
            for arg, grad in zip(which, grads, strict=True):
                assert torch.equal(grad, want[arg in (1, "target")]), (dtype, reduction, argnums)
        over = replace(s, input=s.input.clone(), target=s.target.clone())
        given = (over.target, over.input)
        run(case, over, argnums=(1, 0), reduction=reduction, grad_out=given)
        assert torch.equal(over.input, want[0])
        assert torch.equal(over.target, want[1])
        exact = run(case, s.to(compute), argnums=1, reduction=reduction, scale=0.3)[1]
        buffer = torch.ones(shape, dtype=compute)
        acc = None if dtype is torch.float64 else LossSum()
        options = {"reduction": reduction, "scale": torch.tensor(0.3, dtype=torch.float64)}
        run(case, s, argnums=1, **options, grad_out=buffer, accumulate=True, loss_sum=acc)
        assert torch.equal(buffer, 1 + exact), (dtype, reduction)
        if acc is not None and reduction == "sum" and dtype is torch.float32:
            assert torch.equal(acc.value(), loss)


@every_case
def test_grad_out(case: Case) -> None:
    """The caller's memory, of any layout, is written whole and returned."""
    for dtype, shape in itertools.product(case.dtypes, SHAPES):
        s = case.sample(shape, dtype)
        want = run(case, s)
        poison = torch.full(shape, float("nan"), dtype=dtype)
        gaps = torch.full((*shape, 2), float("nan"), dtype=dtype)
        for out in (poison, poison.mT.contiguous().mT if len(shape) > 1 else poison, gaps[..., 1]):
            out.fill_(float("nan"))
            loss, grad = run(case, s, grad_out=out)
            assert grad.data_ptr() == out.data_ptr()
            assert torch.equal(out, want[1]), (dtype, shape, out.stride())
            assert torch.equal(loss, want[0])
            (grad,) = run(case, s, argnums=(0,), grad_out=(out,))[1]
            assert grad.data_ptr() == out.data_ptr()
            (grad,) = run(case, s, argnums=(0,), grad_out=(None,))[1]
            assert torch.equal(grad, want[1])
        assert gaps[..., 0].isnan().all(), "what lies between the elements was written"


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
def test_grad_out_of_both(case: Case) -> None:
    """An entry None is a fresh gradient; the order is that of argnums."""
    s = case.sample((6, 70), torch.float32)
    want = run(case, s, argnums=(0, 1))[1]
    for argnums in ((0, 1), (1, 0)):
        out = torch.empty(6, 70)
        for outs in ((out, None), [None, out], (out, torch.empty(6, 70))):
            _, grads = run(case, s, argnums=argnums, grad_out=outs)
            for arg, given, grad in zip(argnums, outs, grads, strict=True):
                assert given is None or given.data_ptr() == grad.data_ptr()
                assert torch.equal(grad, want[arg])


@every_case
def test_over_the_input(case: Case) -> None:
    for dtype, reduction, shape in itertools.product(case.dtypes, REDUCTIONS, SHAPES):
        s = case.sample(shape, dtype)
        for view in (
            s.input.clone(),
            s.input.mT.contiguous().mT if len(shape) > 1 else s.input + 0,
        ):
            seen = replace(s, input=view)
            loss, grad = run(case, seen, reduction=reduction)
            version = view._version
            got = run(case, seen, reduction=reduction, grad_out=view)
            assert got[1].data_ptr() == view.data_ptr()
            assert torch.equal(view, grad), (dtype, reduction, view.stride())
            assert torch.equal(got[0], loss)
            assert view._version > version, "an earlier save must notice"


@every_case
def test_grad_out_that_autograd_has_saved(case: Case) -> None:
    """Every entry that is written is missed by a backward that has saved it."""
    s = case.sample((6, 70), torch.float32)
    argnums = tuple(range(len(case.differentiable)))
    for accumulate, changed in itertools.product((False, True), argnums):
        outs = [torch.zeros(6, 70) for _ in argnums]
        factor = torch.ones(6, 70, requires_grad=True)
        saved = (factor * outs[changed]).sum()
        only = [out if k == changed else None for k, out in enumerate(outs)]
        run(case, s, argnums=argnums, grad_out=only, accumulate=accumulate)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()
    parameter = torch.nn.Parameter(torch.zeros(6, 70))
    for out in (parameter, parameter.view(6, 70)):
        saved = (out * out).sum()
        with torch.no_grad():
            run(case, s, grad_out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()


def test_over_the_input_by_another_tensor() -> None:
    x = torch.ones(6, 70)
    version = x._version
    loss_and_grad("mse_loss", x, torch.zeros(6, 70), grad_out=x.data)
    assert x._version > version


def test_a_view_that_was_written_keeps_its_history() -> None:
    base = torch.zeros(6, 70, requires_grad=True) * 1
    view = base.view(70, 6).t()
    with torch.no_grad():
        loss_and_grad("mse_loss", torch.ones(6, 70), torch.zeros(6, 70), grad_out=view)
    view.register_hook(lambda grad: grad)
    view.sum().backward()


def test_over_the_input_in_inference_mode() -> None:
    """Inference tensors have no version counter."""
    for case in CASES:
        s = case.sample((6, 70), torch.float32)
        want = run(case, s)[1]
        with torch.inference_mode():
            x = s.input.clone()
            run(case, replace(s, input=x), grad_out=x)
            assert torch.equal(x, want), case.name


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
def test_over_both_arguments(case: Case) -> None:
    s = case.sample((6, 70), torch.float32)
    want = run(case, s, argnums=(0, 1))[1]
    x, y = s.input.clone(), s.target.clone()
    versions = x._version, y._version
    loss_and_grad(case.name, x, y, argnums=(1, 0), grad_out=(y, x))
    assert torch.equal(x, want[0])
    assert torch.equal(y, want[1])
    assert x._version > versions[0]
    assert y._version > versions[1]


@every_case
def test_accumulate(case: Case) -> None:
    """buffer + fp32 gradient, one addition and one rounding an element, bit by bit."""
    random = torch.Generator().manual_seed(3)
    for variation, dtype, shape in itertools.product(case.variations, case.dtypes, SHAPES):
        s = case.sample(shape, dtype, variation)
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        wide = s.to(compute)
        for reduction, scale in (("sum", None), ("mean", 0.3), ("none", torch.tensor(-3.0))):
            options = {"reduction": reduction, "scale": scale}
            _, grad = run(case, wide, **options)
            start = torch.randn(shape, generator=random, dtype=compute)
            flat = torch.full((*shape, 2), float("nan"), dtype=compute)
            for buffer in (start.clone(), flat[..., 0].copy_(start)):
                _, got = run(
                    case, s, **options,
                    accumulate=True, grad_out=buffer,
                )  # fmt: skip
                label = f"{variation.name} {dtype} {shape} {reduction}"
                assert got.data_ptr() == buffer.data_ptr(), label
                assert torch.equal(buffer, start + grad), label
            assert flat[..., 1].isnan().all(), "what lies between the elements was written"
            fresh = run(case, s, **options, accumulate=True)
            assert fresh[1].dtype is compute, label
            assert torch.equal(fresh[1], torch.zeros_like(grad) + grad), label


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
def test_accumulate_both(case: Case) -> None:
    for dtype in NARROW:
        s = case.sample((6, 70), dtype)
        wide = s.to(torch.float32)
        _, grads = run(case, wide, argnums=(0, 1))
        buffer = torch.ones(6, 70)
        _, (fresh, got) = run(case, s, argnums=(1, 0), grad_out=(None, buffer), accumulate=True)
        assert torch.equal(fresh, grads[1])
        assert got.data_ptr() == buffer.data_ptr()
        assert torch.equal(buffer, 1 + grads[0])


@every_case
def test_scale(case: Case) -> None:
    """A number or 0-dim tensor times the gradient, before its one rounding; never the loss."""
    for dtype, reduction in itertools.product(case.dtypes, REDUCTIONS):
        s = case.sample((6, 70), dtype)
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        loss, grad = run(case, s, reduction=reduction)
        wide = s.to(compute)
        for value in (2.0, -0.5, 3.7, 0, 1e4):
            _, exact = run(case, wide, reduction=reduction, scale=value)
            for scale in (value, torch.tensor(value, dtype=torch.float64), np.float64(value)):
                got = run(case, s, reduction=reduction, scale=scale)
                assert torch.equal(got[0], loss)
                assert torch.equal(got[1], exact.to(dtype)), (dtype, reduction, scale)
            if value == 2.0 and compute is dtype:
                assert torch.equal(exact, grad * 2)


@every_case
def test_numpy(case: Case) -> None:
    """Arrays are used where they lie, and results are arrays."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        s = case.sample((6, 70), dtype)
        want = run(case, s)
        x, target = s.input.numpy().copy(), s.target.numpy().copy()
        third = {k: v.numpy() for k, v in s.options.items()}
        loss, grad = loss_and_grad(case.name, x, target, **third)
        assert isinstance(loss, np.ndarray)
        assert isinstance(grad, np.ndarray)
        assert (loss.shape, loss.dtype, grad.dtype) == ((), x.dtype, x.dtype)
        assert np.array_equal(loss, want[0].numpy())
        assert np.array_equal(grad, want[1].numpy())
        strided = np.empty((70, 6), x.dtype).T
        for out in (np.empty_like(x), strided, x.copy()[:, :]):
            got = loss_and_grad(case.name, x, target, argnums=(0,), grad_out=(out,), **third)[1][0]
            assert np.shares_memory(got, out)
            assert np.array_equal(out, want[1].numpy())
        x.flags.writeable = target.flags.writeable = False
        assert np.array_equal(loss_and_grad(case.name, x, target, **third)[1], want[1].numpy())
        weight = np.linspace(0.5, 1, 6, dtype=x.dtype).reshape(6, *(1,) * (target.ndim - 1))
        weighted = loss_and_grad(case.name, x, target, sample_weight=weight, **third)[0]
        other = run(case, s, sample_weight=torch.from_numpy(weight))[0]
        assert np.array_equal(weighted, other.numpy())
        x = x.copy()
        inside = loss_and_grad(case.name, x, target, grad_out=x, **third)[1]
        assert np.shares_memory(inside, x)
        assert np.array_equal(x, want[1].numpy())


@every_case
def test_loss_sum(case: Case) -> None:
    """Every item's fp32 term, whatever the reduction and divisor; the correctly rounded sum."""
    for variation, dtype in itertools.product(case.variations, NARROW):
        s = case.sample((9, 5), dtype, variation)
        terms = run(case, s, reduction="none", loss_dtype=torch.float32)[0]
        total = sum(map(Fraction, terms.flatten().tolist()), Fraction())
        for reduction, denominator in (("none", None), ("sum", None), ("mean", None), ("mean", 7)):
            acc = LossSum()
            run(
                case, s,
                reduction=reduction, denominator=denominator, loss_sum=acc, scale=3,
            )  # fmt: skip
            label = f"{variation.name} {dtype} {reduction} / {denominator}"
            assert acc.value(dtype=torch.float64).item() == float(total), label
            loss = acc.value().item()
            assert loss == np.float32(math.fsum(terms.flatten().tolist())), label
    run(case, s, loss_sum=acc)
    assert acc.value(dtype=torch.float64).item() == float(2 * total), "a second call adds"


@pytest.mark.parametrize("case", TRIPLES, ids=lambda case: case.name)
def test_third_argument(case: Case) -> None:
    """Written over itself, accumulated, by position and by name; strides of all are kept apart."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        s = case.sample((6, 70), dtype)
        tensors = tuple(case.tensors(s).values())
        options = {"argnums": (0, 1, 2), "reduction": reduction}
        loss, want = loss_and_grad(case.name, *tensors, **options)
        named, grads = loss_and_grad(case.name, **case.tensors(s), **options)
        assert torch.equal(named, loss)
        assert all(map(torch.equal, grads, want))
        wide = tuple(t.to(compute) for t in tensors)
        _, exact = loss_and_grad(case.name, *wide, **options)
        views = tuple(t.t().contiguous().t() if k % 2 else t for k, t in enumerate(tensors))
        buffers = tuple(torch.full((6, 70), k, dtype=compute) for k in range(3))
        _, sums = loss_and_grad(case.name, *views, **options, grad_out=buffers, accumulate=True)
        for k, (total, grad) in enumerate(zip(sums, exact, strict=True)):
            assert torch.equal(total, k + grad), (dtype, reduction, k)
        over = tuple(t.clone() for t in tensors)
        versions = [t._version for t in over]
        loss_and_grad(case.name, *over, **options, grad_out=over)
        assert all(map(torch.equal, over, want)), (dtype, reduction)
        assert all(t._version > v for t, v in zip(over, versions, strict=True))


def part(s: Sample, begin: int, size: int) -> Sample:
    """Some of the items."""
    cut = {k: v[begin : begin + size] for k, v in s.options.items()}
    return Sample(s.input[begin : begin + size], s.target[begin : begin + size], cut)


@every_case
def test_loss_of_every_cut(case: Case) -> None:
    """Through one LossSum the loss of a mini-batch is the same bits however it is cut."""
    s = case.sample((40, 130), torch.float32)
    whole = LossSum()
    loss = run(case, s, reduction="sum", loss_sum=whole)[0]
    assert torch.equal(whole.value(), loss)
    for sizes in ([1] * 40, [7, 33], [13, 13, 14], [0, 40]):
        cut = LossSum()
        for begin, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False):
            run(case, part(s, begin, size), denominator=40, loss_sum=cut)
        assert torch.equal(cut.state, whole.state), sizes
        assert torch.equal(cut.value(40), whole.value(40))
