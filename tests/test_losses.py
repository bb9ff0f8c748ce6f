"""Every loss of the case list against its formula in fp64, in every dtype, layout and option."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import CASES, COLUMNS, DTYPES, REDUCTIONS, Case, Sample, Variation, check
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
ROWS = [case for case in CASES if case.has_rows]

Result = tuple[Tensor | None, ...]  # loss, and a gradient for each argument that has one
Expected = tuple[Result, Result, tuple[float, ...]]  # exact, torch's, magnitudes


def differentiate(
    function: Callable[..., Tensor],
    case: Case,
    sample: Sample,
    *,
    reduction: str = "mean",
    **options: Any,
) -> Result:
    """Loss and gradients, from a random incoming gradient where the loss is not a scalar."""
    sample, leaves = case.leaves(sample)
    loss = function(sample.input, sample.target, **sample.options, **options, reduction=reduction)
    loss.backward(incoming_gradient(loss, reduction))
    return loss.detach(), *(leaf.grad for leaf in leaves.values())


def incoming_gradient(loss: Tensor, reduction: str) -> Tensor:
    """Of few bits, so that it is the same in every dtype."""
    if reduction != "none":
        return torch.ones_like(loss)
    random = torch.Generator().manual_seed(0)
    return torch.randint(-8, 9, loss.shape, generator=random).to(loss.dtype) / 4


def _by_torch(case: Case, sample: Sample, reduction: str) -> Result | None:
    """Torch's own result; None where it has no kernel for the dtype (2.6: smooth_l1 in fp16)."""
    assert case.torch is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that shapes differ
        try:
            return differentiate(case.torch, case, sample, reduction=reduction)
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            return None


def expect(case: Case, sample: Sample, variation: Variation, wide: Sample) -> list[Expected]:
    """For every reduction: the reference from ``wide`` (the sample in fp64), and torch's result."""
    expected = []
    for reduction in REDUCTIONS:
        want = differentiate(case.reference, case, wide, reduction=reduction)
        stock: Result = (None,) * len(want)
        if case.torch is not None and variation.torch:
            index = not sample.target.is_floating_point()
            sample = replace(sample, target=sample.target.long()) if index else sample
            stock = _by_torch(case, sample, reduction) or stock
        incoming = incoming_gradient(want[0], reduction)
        expected.append((want, stock, case.sizes(wide, incoming, reduction)))
    return expected


@cache  # the same for every instruction set
def build(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, variation: Variation
) -> tuple[Sample, list[Expected]]:
    sample = case.sample(shape, dtype, variation, seed=sum(shape))
    return sample, expect(case, sample, variation, sample.to(torch.float64))


def compare(
    case: Case,
    sample: Sample,
    variation: Variation,
    label: str,
    expected: list[Expected] | None = None,
) -> None:
    """Check loss and gradients for every reduction."""
    expected = expected or expect(case, sample, variation, sample.to(torch.float64))
    for reduction, (want, stock, sizes) in zip(REDUCTIONS, expected, strict=True):
        got = differentiate(case.function, case, sample, reduction=reduction)
        where = f"{case.name} {variation.name} {reduction} {sample.input.dtype} {label}"
        check_all(got, want, stock, sizes, where)


def check_all(
    got: Result, want: Result, stock: Result, sizes: tuple[float, ...], where: str
) -> None:
    names = ("loss", "first grad", "second grad", "third grad")[: len(want)]
    for name, mine, exact, theirs, size in zip(names, got, want, stock, sizes, strict=False):
        assert mine is not None, f"{where}: no {name}"
        assert exact is not None
        check(mine, exact, theirs, f"{where}: {name}", size)
    assert len(got) == len(want), where


def test_the_case_list_is_complete() -> None:
    every = [loss for loss in mbkern.losses() if loss.kind != "multirow"]  # those: test_rows.py
    assert {case.name for case in CASES} == {loss.name for loss in every}
    for loss in every:
        (case,) = (case for case in CASES if case.name == loss.name)
        assert case.differentiable == loss.differentiable


@every_dtype
@every_case
def test_sizes(case: Case, dtype: torch.dtype, isa: str) -> None:
    """Every tail of vectors, groups and blocks; items enough for whole vectors of items."""
    for columns, variation in itertools.product(COLUMNS, case.variations):
        if variation.name in ("plain", "probabilities", "everything"):
            items = 37 if columns <= 129 else 3
            sample, expected = build(case, (items, columns), dtype, variation)
            compare(case, sample, variation, f"{items} x {columns}", expected)


@every_dtype
@every_case
def test_options(case: Case, dtype: torch.dtype, isa: str) -> None:
    """Every variation, unbatched, batched and with further dimensions."""
    shapes = ((5,), (300,), (6, 300), (3, 70, 2, 5), (2, 5, 19))
    for variation, shape in itertools.product(case.variations, shapes):
        sample, expected = build(case, shape, dtype, variation)
        compare(case, sample, variation, str(shape), expected)


def _gaps(x: Tensor, dim: int, step: int = 1) -> Tensor:
    """A view of a larger tensor that has NaN around it and, with a step, between its slices."""
    shape = list(x.shape)
    shape[dim] = shape[dim] * step + 2
    big = torch.full(shape, float("nan") if x.is_floating_point() else 99, dtype=x.dtype)
    view = big.narrow(dim, 1, x.shape[dim] * step)
    view = view[(slice(None),) * (dim % x.dim()) + (slice(None, None, step),)]
    view.copy_(x)
    return view


def _permuted(x: Tensor, *order: int) -> Tensor:
    """The same values, laid out in memory with the dimensions in this order."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels last": ((3, 21, 5, 4), lambda x: x.to(memory_format=torch.channels_last)),
    "channels last, long": ((2, 300, 3, 2), lambda x: x.to(memory_format=torch.channels_last)),
    "(N, L, C).transpose": ((3, 70, 5), lambda x: _permuted(x, 0, 2, 1)),
    "(C, N).t": ((7, 130), lambda x: x.t().contiguous().t()),
    "(C, N).t, few classes": ((37, 5), lambda x: x.t().contiguous().t()),
    "rows with gaps": ((5, 129), lambda x: _gaps(x, 1)),
    "columns with gaps": ((5, 129), lambda x: _gaps(x, 1, 2)),
    "rows skipped": ((5, 9), lambda x: _gaps(x, 0, 3)),
    "inner gaps": ((2, 9, 5, 6), lambda x: _gaps(x, 3)),
    "dimensions that do not merge": ((2, 9, 5, 6), lambda x: _permuted(x, 0, 1, 3, 2)),
    "any order": ((2, 9, 5, 6), lambda x: _permuted(x, 3, 1, 0, 2)),
    "one row expanded": ((6, 33), lambda x: x[:1].expand(6, 33)),
    "one column expanded": ((6, 33), lambda x: x[:, :1].expand(6, 33)),
    "one element expanded": ((4, 9, 3), lambda x: x[:1, :1, :1].expand(4, 9, 3)),
    "unbatched, gaps": ((200,), lambda x: _gaps(x, 0, 2)),
    "five dimensions": ((2, 5, 3, 2, 4), lambda x: _permuted(x, 0, 2, 3, 4, 1)),
}


@every_dtype
@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: Case, dtype: torch.dtype, layout: str) -> None:
    shape, view = LAYOUTS[layout]
    for variation in case.variations:
        if variation.name not in ("plain", "probabilities", "everything"):
            continue
        sample = case.sample(shape, dtype, variation, seed=3)
        compare(case, replace(sample, input=view(sample.input)), variation, layout)
        if sample.target.shape == sample.input.shape:
            other = replace(sample, target=view(sample.target))
            compare(case, other, variation, f"{layout} of the target")
        elif sample.target.dim() > 0:
            both = replace(sample, input=view(sample.input), target=_gaps(sample.target, -1, 2))
            compare(case, both, variation, f"{layout}, target with gaps")


@every_case
def test_arguments_are_left_alone(case: Case) -> None:
    """Padding around the views of an input is not written, nor is the input."""
    sample = case.sample((5, 129), torch.float32)
    view = _gaps(sample.input, 1, 2)
    base = view._base
    assert base is not None
    before, target = base.clone(), sample.target.clone()
    differentiate(case.function, case, replace(sample, input=view))
    assert torch.equal(base.view(torch.int32), before.view(torch.int32))
    assert torch.equal(sample.target, target)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("case", [c for c in CASES if not c.has_rows], ids=lambda case: case.name)
def test_broadcasting(case: Case) -> None:
    """Gradients have their argument's shape; their sum is torch's, so not that of 16-bit ones."""
    shapes = (((4, 1, 5), (3, 5)), ((), (7,)), ((6,), ()), ((0, 3), (1, 3)))
    if case.one_shape:
        for shape, other in shapes:
            with pytest.raises(ValueError, match="of one shape"):
                case.function(torch.rand(shape), torch.rand(other))
        return
    for (shape, other), dtype in itertools.product(shapes, DTYPES):
        a, b = case.sample(shape, dtype, seed=1), case.sample(other, dtype, seed=2)
        plain = Variation("broadcast", torch=case.torch_broadcasts)
        sample = Sample(a.input, b.target, a.options)
        expected = expect(case, sample, plain, sample.to(torch.float64))
        if dtype in (torch.float32, torch.float64):
            compare(case, sample, plain, f"{shape} {other}", expected)
        for reduction, (want, stock, sizes) in zip(REDUCTIONS, expected, strict=True):
            loss = case.function(sample.input, sample.target, reduction=reduction, **sample.options)
            label = f"{case.name} {shape} {other} {dtype} {reduction}"
            check(loss, want[0], stock[0], label, sizes[0])


@pytest.mark.parametrize("case", [c for c in CASES if not c.has_rows], ids=lambda case: case.name)
def test_torchs_warning_of_broadcasting(case: Case) -> None:
    """The same words, of the caller, wherever torch warns."""
    if case.one_shape or case.torch is None:
        return
    inputs = case.sample((8, 1), torch.float32), case.sample((8,), torch.float32)
    x, y = inputs[0].input, inputs[1].target
    seen = []
    for function in (case.torch, case.function):
        if function is case.torch and not case.torch_broadcasts:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(x, y, **inputs[0].options)
        names = [w.filename for w in caught]
        if function is case.torch:  # of kl_div, older versions name a line of their own
            names = [__file__ if name == torch.nn.functional.__file__ else name for name in names]
        seen.append([(w.category, str(w.message)) for w in caught] + names)
    assert seen[1] == seen[0]


def test_many_dimensions() -> None:
    """Ten dimensions that do not merge, in every view."""
    shape = (2,) * 10
    values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x, y = values[0].permute(*reversed(range(10))), values[1]
    for reduction, accumulate in itertools.product(REDUCTIONS, (False, True)):
        options: dict[str, Any] = {"argnums": (0, 1), "reduction": reduction}
        flat, grads = mbkern.loss_and_grad("mse_loss", x.reshape(-1), y.reshape(-1), **options)
        if accumulate:
            outs = tuple(torch.ones(shape).transpose(k, k + 2) for k in (0, 1))
            options |= {"accumulate": True, "grad_out": outs}
        many, sums = mbkern.loss_and_grad("mse_loss", x, y, **options)
        if reduction == "none":
            assert torch.equal(many.reshape(-1), flat)
        else:  # summed exactly: the order of memory does not matter
            assert torch.equal(many, flat)
        for got, want in zip(sums, grads, strict=True):
            assert torch.equal(got.reshape(-1), want + 1 if accumulate else want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_columns(dtype: torch.dtype) -> None:
    """More than 512 blocks of 1024 columns, some of whose sums are out of the common range."""
    columns = 600_011
    x = torch.randn(4, columns, dtype=dtype, generator=torch.Generator().manual_seed(3))
    x[1] = -79.0  # sums below 2^-36 beside the maximum
    x[1, 7] = 0.0
    x[2] -= torch.arange(columns) / 2000
    x[3, 5000:] = -float("inf")
    target = torch.tensor([0, 7, 1500, 4999])
    exact = torch.nn.functional.cross_entropy(x.double(), target, reduction="none")
    results = set()
    for isa in _C.isas():
        _C.set_isa(isa)
        loss, grad = mbkern.loss_and_grad("cross_entropy", x, target, reduction="none")
        results.add(hash(loss.numpy().tobytes() + grad.numpy().tobytes()))
        assert (loss.double() - exact).abs().max() <= 1e-6 * exact.max()
        assert grad.double().sum(1).abs().max() < 1e-4
    _C.set_isa(_C.isas()[0])
    assert len(results) == 1


@every_dtype
@every_case
def test_empty(case: Case, dtype: torch.dtype, isa: str) -> None:
    """No items: sum 0, mean NaN, gradients with no elements, as in torch."""
    for variation, shape in itertools.product(case.variations, ((0, 7), (0, 7, 3), (2, 7, 0))):
        sample = case.sample(shape, dtype, variation)
        compare(case, sample, variation, str(shape))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_every_item_ignored(case: Case) -> None:
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        sample = replace(case.sample((4, 9), dtype), target=torch.full((4,), -100))
        loss, grad = differentiate(case.function, case, sample, reduction=reduction)
        value = float("nan") if reduction == "mean" else 0.0
        assert torch.equal(loss.isnan(), torch.full_like(loss, value).isnan()), loss
        assert torch.equal(loss.nan_to_num(), torch.zeros_like(loss)), loss
        assert torch.equal(grad, torch.zeros_like(grad)), (dtype, reduction)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", [(9, 200), (9, 20), (2, 200, 5), ()], ids=str)
def test_integer_dtypes(case: Case, shape: tuple[int, ...], isa: str) -> None:
    """Indices of every integer dtype are those numbers; a uint8 156 is not the int8 -100."""
    shape = shape or (200,)
    columns = shape[1] if len(shape) > 1 else shape[0]
    items = shape[:1] + shape[2:] if len(shape) > 1 else ()
    sample = case.sample(shape, torch.float32)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        top = min(columns, torch.iinfo(dtype).max)
        index = torch.randint(top, items, generator=torch.Generator().manual_seed(5))
        index.view(-1)[-1] = min(156, top - 1)
        for ignored in (-100, int(index.view(-1)[0]), 3):
            target = index.clone()
            if index.dim() and (ignored >= 0 or dtype is not torch.uint8):
                target.view(-1)[1] = ignored
            narrow = Sample(sample.input, target.to(dtype), {"ignore_index": ignored})
            wide = Sample(sample.input.double(), target, {"ignore_index": ignored})
            variation = Variation(f"{dtype}, ignored {ignored}")
            expected = expect(case, narrow, variation, wide)
            compare(case, narrow, variation, str(shape), expected)


@every_case
def test_denominator(case: Case) -> None:
    """A number or 0-dim tensor of any dtype divides instead of the mean's own divisor."""
    for dtype in case.dtypes:
        sample = case.sample((6, 70), dtype)
        wide = sample.to(torch.float64)
        total = differentiate(case.reference, case, wide, reduction="sum")
        sizes = case.sizes(wide, torch.ones(()), "sum")
        for value in (7, 2.5, torch.tensor(7), torch.tensor(2.5), torch.tensor(2.5).bfloat16()):
            options = sample.options | {"denominator": value}
            got = differentiate(case.function, case, replace(sample, options=options))
            want = tuple(t / float(value) for t in total)
            label = f"{case.name} {dtype} / {value!r}"
            check_all(got, want, (None,) * 4, tuple(s / float(value) for s in sizes), label)


@every_case
def test_loss_dtype(case: Case) -> None:
    """The result is rounded once to the dtype asked for, and the gradient is what it was."""
    for dtype, result, reduction in itertools.product(case.dtypes, DTYPES, REDUCTIONS):
        sample = case.sample((6, 70), dtype)
        options = {"reduction": reduction}
        want = differentiate(case.reference, case, sample.to(torch.float64), **options)
        _, *usual = differentiate(case.function, case, sample, **options)
        loss, *grads = differentiate(case.function, case, sample, **options, loss_dtype=result)
        label = f"{case.name} {dtype} {reduction} -> {result}"
        assert loss.dtype is result, label
        if result is torch.float64 and dtype is not torch.float64:
            loss = loss.float()  # its terms have no more digits than fp32
        size = case.sizes(sample.to(torch.float64), torch.ones(()), reduction)[0]
        check(loss, want[0], None, label, size)
        assert all(map(torch.equal, grads, usual)), label


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_sample_weight_broadcasts(case: Case) -> None:
    for dtype, shape in itertools.product(DTYPES, ((), (1,), (5,), (1, 5), (3, 1), (3, 5))):
        sample = case.sample((3, 19, 5), dtype)
        weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)
        sample = replace(sample, options={"sample_weight": weight})
        compare(case, sample, Variation("sample weight", torch=False), str(shape))


def test_softcap_and_z_loss_off() -> None:
    """Options at their neutral values change no bit."""
    case = ROWS[0]
    for shape in ((5, 19), (3, 1100)):
        sample = case.sample(shape, torch.float32)
        plain = differentiate(case.function, case, sample)
        neutral = {"z_loss": 0.0, "softcap": None, "label_smoothing": 0.0, "denominator": None}
        options = differentiate(case.function, case, replace(sample, options=neutral))
        assert torch.equal(plain[0], options[0])
        assert torch.equal(plain[1], options[1])
