"""Losses of rows of several tensors: their formulas in fp64, and the same bits everywhere."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from cases import DTYPES, REDUCTIONS, check
from row_case import RowCase, RowSample, Variation
from row_cases import KERNELS, ROW_CASES, direct
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize("case", ROW_CASES, ids=lambda case: case.name)
every_kernel = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
COLUMNS = (1, 2, 3, 16, 17, 63, 64, 65, 129, 1000, 1025, 2049)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Result = list[Tensor | None]
Expected = tuple[Result, Result, tuple[float, ...]]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    isa, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


def incoming_gradient(loss: Tensor, reduction: str) -> Tensor:
    """Of few bits, so that it is the same in every dtype."""
    if reduction != "none":
        return torch.ones_like(loss)
    random = torch.Generator().manual_seed(0)
    return torch.randint(-8, 9, loss.shape, generator=random).to(loss.dtype) / 4


def differentiate(
    function: Callable[..., Tensor], case: RowCase, sample: RowSample, reduction: str, **more: Any
) -> Result:
    """Loss and gradients."""
    sample, leaves = case.leaves(sample)
    loss = function(**sample.tensors, **sample.options, reduction=reduction, **more)
    loss.backward(incoming_gradient(loss, reduction))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def by_torch(case: RowCase, sample: RowSample, reduction: str) -> Result | None:
    """Torch's result, None where it has none for the dtype."""
    assert case.torch is not None
    try:
        return differentiate(case.torch, case, sample, reduction)
    except RuntimeError as error:
        assert re.search("not implemented for|must be contiguous", str(error))  # noqa: PT017
        return None


def expect(
    case: RowCase,
    sample: RowSample,
    variation: Variation,
    reductions: tuple[str, ...] = REDUCTIONS,
) -> list[Expected]:
    """For every reduction: the reference, torch's result, magnitudes."""
    wide, expected = sample.to(torch.float64), []
    for reduction in reductions:
        if reduction != "mean" and "denominator" in sample.options:
            continue
        want = differentiate(case.reference, case, wide, reduction)
        stock = None
        if case.torch is not None and variation.torch:
            stock = by_torch(case, sample, reduction)
        incoming = incoming_gradient(want[0], reduction)
        sizes = case.sizes(wide, incoming, reduction)
        expected.append((want, stock or [None] * 4, sizes))
    return expected


@cache  # the same for every instruction set
def build(
    case: RowCase, shape: tuple[int, ...], dtype: torch.dtype, variation: Variation
) -> tuple[RowSample, list[Expected]]:
    sample = case.sample(shape, dtype, variation, seed=sum(shape))
    return sample, expect(case, sample, variation)


def compare(
    case: RowCase,
    sample: RowSample,
    variation: Variation,
    label: str,
    expected: list[Expected] | None = None,
    reductions: tuple[str, ...] = REDUCTIONS,
) -> None:
    """Check loss and gradients for every reduction."""
    expected = expected or expect(case, sample, variation, reductions)
    reductions = ("mean",) if "denominator" in sample.options else reductions
    for reduction, (want, stock, sizes) in zip(reductions, expected, strict=True):
        got = differentiate(case.function, case, sample, reduction)
        assert len(got) == len(want)
        for name, g, w, s, size in zip(
            ("loss", *case.inputs), got, want, stock, sizes, strict=False
        ):
            dtype = next(iter(sample.tensors.values())).dtype
            where = f"{case.name} {variation.name} {reduction} {dtype} {label}: {name}"
            assert g is not None, where
            assert w is not None
            assert g.dtype is dtype, where
            check(g, w, s, where, size)


def test_the_case_list_is_complete() -> None:
    losses = [loss for loss in mbkern.losses() if loss.kind == "multirow"]
    assert [case.name for case in KERNELS] == [loss.name for loss in losses]
    for case, loss in zip(KERNELS, losses, strict=True):
        assert case.inputs == loss.differentiable
        assert case.images == (
            "(N, C, d1" in (case.function.__doc__ or "")
            or case.inputs == ("student", "teacher")
            or "entropy" in case.name
        )


@every_dtype
@every_case
def test_sizes(case: RowCase, dtype: torch.dtype, isa: str) -> None:
    """Every tail of vectors, groups and blocks; items enough for whole vectors of items."""
    for columns in COLUMNS:
        items = 73 if columns <= 129 else 5  # of few items the luckier library has less error
        sample, expected = build(case, (items, columns), dtype, case.variations[0])
        compare(case, sample, case.variations[0], f"{items} x {columns}", expected)


@every_dtype
@every_case
def test_options(case: RowCase, dtype: torch.dtype, isa: str) -> None:
    """Every variation, unbatched, batched and with further dimensions; no items, none counted."""
    shapes: tuple[tuple[int, ...], ...] = ((6, 150), (0, 7), (19, 5))
    if case.name not in ("dice_loss", "info_nce_loss"):
        shapes += ((5,), (130,))
    if case.images:
        shapes += ((3, 70, 2, 5), (2, 5, 19), (2, 7, 0))
    if case.name == "dice_loss":
        shapes += ((3, 4, 5),)
    for variation, shape in itertools.product(case.variations, shapes):
        if case.name == "dice_loss" and len(shape) > 2 and "sample_weight" in variation.options:
            continue  # has one an item
        sample, expected = build(case, shape, dtype, variation)
        compare(case, sample, variation, str(shape), expected)


def gaps(x: Tensor, dim: int, step: int = 1) -> Tensor:
    """A view of a larger tensor that has NaN around it and, with a step, between its slices."""
    shape = list(x.shape)
    shape[dim] = shape[dim] * step + 2
    big = torch.full(shape, float("nan") if x.is_floating_point() else 99, dtype=x.dtype)
    view = big.narrow(dim, 1, x.shape[dim] * step)
    view = view[(slice(None),) * dim + (slice(None, None, step),)]
    view.copy_(x)
    return view


def unaligned(x: Tensor) -> Tensor:
    """The same one element further in memory than vectors want it."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(x.shape).copy_(x)


def permuted(x: Tensor, *order: int) -> Tensor:
    """The same values, laid out in memory with the dimensions in this order."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "(C, N).t": ((7, 130), lambda x: x.t().contiguous().t()),
    "(C, N).t, few columns": ((37, 5), lambda x: x.t().contiguous().t()),
    "rows with gaps": ((5, 129), lambda x: gaps(x, 1)),
    "columns with gaps": ((5, 129), lambda x: gaps(x, 1, 2)),
    "rows skipped": ((5, 9), lambda x: gaps(x, 0, 3)),
    "one row expanded": ((6, 33), lambda x: x[:1].expand(6, 33)),
    "one column expanded": ((6, 33), lambda x: x[:, :1].expand(6, 33)),
    "unaligned": ((5, 65), unaligned),
    "channels last": ((3, 21, 5, 4), lambda x: x.to(memory_format=torch.channels_last)),
    "(N, L, C).transpose": ((3, 70, 5), lambda x: permuted(x, 0, 2, 1)),
    "inner gaps": ((2, 9, 5, 6), lambda x: gaps(x, 3)),
    "any order": ((2, 9, 5, 6), lambda x: permuted(x, 3, 1, 0, 2)),
    "one element expanded": ((4, 9, 3), lambda x: x[:1, :1, :1].expand(4, 9, 3)),
}


@every_dtype
@every_case
def test_layouts(case: RowCase, dtype: torch.dtype) -> None:
    for layout, (shape, view) in LAYOUTS.items():
        if len(shape) > 2 and not case.images:
            continue
        sample = case.sample(shape, dtype, seed=3)
        for name in case.inputs:
            seen = sample.of(**{name: view(sample.tensors[name])})
            compare(case, seen, case.variations[0], f"{layout} of {name}")
        rest = {
            n: view(t) if t.shape == shape and "expanded" not in layout else gaps(t, t.dim() - 1, 2)
            for n, t in sample.tensors.items()
        }
        compare(case, sample.of(**rest), case.variations[0], f"{layout} of all")


@every_case
def test_arguments_are_left_alone(case: RowCase) -> None:
    """Padding around the views of the tensors is not written, nor are they."""
    sample = case.sample((5, 129))
    views = {n: gaps(t, t.dim() - 1, 2) for n, t in sample.tensors.items()}
    bases = [view._base for view in views.values()]
    before = [base.clone() for base in bases]  # type: ignore[union-attr]
    differentiate(case.function, case, sample.of(**views), "mean")
    for base, copy in zip(bases, before, strict=True):
        assert base is not None
        assert same_bits(base, copy)


# ---- the same bits -------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = INTEGER[a.element_size()]
    assert a.dtype == b.dtype
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def of_pieces(case: RowCase, sample: RowSample, sizes: list[int]) -> list[Tensor]:
    """Unreduced losses, gradients of the mean with one denominator, and the exact sum."""
    wide = sample.tensors[case.inputs[0]].dtype is torch.float64
    total, parts, begin = None if wide else mbkern.LossSum(), [], 0
    for size in sizes:
        tensors, options = direct(case, sample.part(slice(begin, begin + size)))
        begin += size
        rest: dict[str, Any] = options | {"argnums": case.inputs, "denominator": 57.0}
        loss, _ = mbkern.loss_and_grad(case.name, *tensors, **options, reduction="none")
        _, grads = mbkern.loss_and_grad(case.name, *tensors, **rest, loss_sum=total)
        parts.append([loss, *grads])
    results = [torch.cat(part) for part in zip(*parts, strict=True)]
    return results if total is None else [*results, total.state]


@every_dtype
@every_kernel
def test_bits(case: RowCase, dtype: torch.dtype) -> None:
    """Every cut in two and into single items, threads and instruction sets."""
    last = [v for v in case.variations if "denominator" not in v.options][-1]
    for (items, columns), variation in (
        ((16, 70), case.variations[0]),
        ((13, 9), last),
        ((9, 1100), last),
    ):
        sample = case.sample((items, columns), dtype, variation, seed=columns)
        want = of_pieces(case, sample, [items])
        cuts = [[items], [1] * items, *([k, items - k] for k in range(1, items))]
        for isa, threads in itertools.product(_C.isas(), (1, 2, 3)):
            _C.set_isa(isa)
            torch.set_num_threads(threads)
            for sizes in cuts if threads == 1 and isa != "scalar" else cuts[:3]:
                got = of_pieces(case, sample, sizes)
                for k, (g, w) in enumerate(zip(got, want, strict=True)):
                    label = f"{variation.name} {isa}, {threads} threads, cut {sizes}: result {k}"
                    assert same_bits(g, w), label


@every_dtype
@pytest.mark.parametrize("case", [c for c in KERNELS if c.images], ids=lambda case: case.name)
def test_bits_of_layouts(case: RowCase, dtype: torch.dtype) -> None:
    """Lanes along the row or across items."""
    for columns in (7, 65, 300):
        rows = case.sample((24, columns), dtype, seed=columns)
        tensors, options = direct(case, rows)
        names = {"argnums": case.inputs, "reduction": "none", **options}
        loss, grads = mbkern.loss_and_grad(case.name, *tensors, **names)
        images = [
            t.view(2, 3, 4, columns).permute(0, 3, 1, 2) if t.dim() > 1 else t.view(2, 3, 4)
            for t in tensors
        ]
        for isa in _C.isas():
            _C.set_isa(isa)
            for pieces in (images, [t.contiguous() for t in images]):
                got, many = mbkern.loss_and_grad(case.name, *pieces, **names)
                assert same_bits(got.reshape(24), loss), f"{isa} {columns}"
                for g, w in zip(many, grads, strict=True):
                    assert same_bits(g.movedim(1, -1).reshape(24, columns), w), f"{isa} {columns}"


# ---- special values ------------------------------------------------------------------------------


@every_case
def test_odd_rows(case: RowCase, isa: str) -> None:
    """A row of NaN, infinities or huge numbers changes no bit of another row."""
    for dtype, columns in itertools.product(DTYPES, (9, 70)):
        sample = case.sample((8, columns), dtype, seed=1)
        want = differentiate(case.function, case, sample, "none")
        for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 88.0, -88.0):
            for name in case.inputs:
                odd = sample.tensors[name].clone()
                odd[2], odd[5, 3] = value, value
                got = differentiate(case.function, case, sample.of(**{name: odd}), "none")
                rest = torch.tensor([0, 1, 3, 4, 6, 7])
                for g, w in zip(got, want, strict=True):
                    assert g is not None
                    assert w is not None
                    assert same_bits(g[rest], w[rest]), f"{dtype} {value} in {name}"


@pytest.mark.parametrize("case", [c for c in ROW_CASES if c.torch], ids=lambda case: case.name)
def test_special_values(case: RowCase, isa: str) -> None:
    """NaN and infinite where torch's losses of the same numbers in fp64 are; right elsewhere."""
    assert case.torch is not None
    for columns, dtype in itertools.product((5, 70), DTYPES):
        sample = case.sample((8, columns), dtype, seed=1)
        for value, name in itertools.product(
            (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 88.0, -88.0), case.inputs
        ):
            odd = sample.tensors[name].clone()
            odd[::2, 3] = value
            odd[1] = value
            seen = sample.of(**{name: odd})
            wide = seen.to(torch.float64)
            for k in (0, 1, 3):  # one by one: a huge row must not hide the others
                part = wide.part(slice(k, k + 1))
                loss = case.function(**seen.part(slice(k, k + 1)).tensors, reduction="none")
                want = case.torch(**part.tensors, reduction="none")
                size = case.sizes(part, torch.ones(1), "none")[0]
                check(loss, want, None, f"{case.name} {dtype} {value} in {name}, row {k}", size)


DISTANCES = [case for case in ROW_CASES if case.inputs == ("student", "teacher")]


SOFTMAXES = [case for case in ROW_CASES if any("temperature" in v.options for v in case.variations)]


@pytest.mark.parametrize("case", SOFTMAXES, ids=lambda case: case.name)
def test_extreme_logits(case: RowCase, isa: str) -> None:
    """Huge logits are like any others; NaN and +inf make their item NaN, and -inf is no class."""
    for columns, dtype in itertools.product((5, 70), DTYPES):
        sample = case.sample((8, columns), dtype, seed=1)
        for value, name in itertools.product(
            (float("nan"), float("inf"), 1e30, -1e30, 88.0, -2e4), case.inputs
        ):
            odd = sample.tensors[name].clone()
            odd[::2, 3] = value
            odd[1] = value
            infinite = not torch.isfinite(torch.tensor(value, dtype=dtype))
            for k in () if infinite else (0, 1, 3):  # a huge row must not hide the others
                part = sample.of(**{name: odd}).part(slice(k, k + 1))
                label = f"{value} in {name}, row {k}"
                compare(case, part, case.variations[0], label, reductions=("none",))
            if infinite and value != -1e30:  # which is -inf in fp16, and no class
                loss = case.function(**sample.of(**{name: odd}).tensors, reduction="none")
                want = torch.tensor([True, True, *[True, False] * 3])
                assert torch.equal(loss.isnan(), want), f"{case.name} {dtype} {value} {name} {loss}"


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_identical_distributions(case: RowCase, isa: str) -> None:
    """The distance is 0, and so are the gradients, exactly."""
    for dtype, columns, variation in itertools.product(DTYPES, (1, 5, 70, 1100), case.variations):
        sample = case.sample((6, columns), dtype, variation)
        scale = torch.tensor([0.1, 1, 5, 10, 30, 100], dtype=dtype).unsqueeze(-1)
        same = sample.tensors["student"] * scale
        if "denominator" in variation.options:
            continue
        both = sample.of(student=same, teacher=same)
        got = differentiate(case.function, case, both, "none")
        for result in got:
            assert result is not None
            zero = result.double().abs().max()
            assert zero == 0, f"{case.name} {variation.name} {dtype} {columns}: {zero}"


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_near_distributions(case: RowCase, isa: str) -> None:
    """Small distances are right in all their digits: the terms are not negative."""
    random = torch.Generator().manual_seed(4)
    for columns, step in itertools.product((3, 70, 1100), (1e-2, 1e-3)):
        student = torch.randn(5, columns, generator=random)
        teacher = student + step * torch.randn(5, columns, generator=random)
        got = case.function(student, teacher, reduction="none")
        want = case.reference(student=student.double(), teacher=teacher.double(), reduction="none")
        # The logarithm of a ratio, some step, is rounded like numbers of 1, and enters squared.
        tolerance = 16 * torch.finfo(torch.float32).eps / step
        assert ((got - want) / want).abs().max() <= tolerance, f"{columns} {step}"


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_one_class_is_nearly_certain_on_both_sides(case: RowCase, isa: str) -> None:
    """p - t of that class is a small difference of large numbers, and as exact as the others.

    Their exponents, of up to 25, are rounded to 1e-6, and their terms may cancel a little.
    """
    for margin, columns, variation in itertools.product(
        (8.0, 16.0, 20.0), (7, 1500), case.variations
    ):
        made = case.sample((5, columns), torch.float32, variation, seed=int(margin))
        scale = made.options.get("temperature", 1.0)
        reduction = "mean" if "denominator" in made.options else "none"
        both = {n: made.tensors[n].clone() for n in case.inputs}
        for t in both.values():
            t[:, 3] = t.amax() + margin * scale
        results = []
        for function, dtype in ((case.function, torch.float32), (case.reference, torch.float64)):
            sample, leaves = case.leaves(made.of(**both).to(dtype))
            loss = function(**sample.tensors, **sample.options, reduction=reduction)
            results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
        for got, want in zip(*results, strict=True):
            error, size = (got - want).abs(), want.abs()
            if want.dim() > 1:
                error, size = error.amax(1), size.amax(1)
            assert (error <= 2e-5 * size + 1e-14).all(), (margin, columns, variation)


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_one_hot_distributions(case: RowCase, isa: str) -> None:
    """Masked logits on both sides, and distributions with one class each."""
    inf = float("inf")
    for dtype in DTYPES:
        student = torch.tensor([[0.0, 1, -inf], [80, 0, 0], [1, -inf, -inf]], dtype=dtype)
        teacher = torch.tensor([[1.0, 0, -inf], [0, 80, 0], [2, -inf, -inf]], dtype=dtype)
        loss, *grads = differentiate(
            case.function, case, RowSample({"student": student, "teacher": teacher}, {}), "none"
        )
        first = [t[:1, :2].double() for t in (student, teacher)]
        want = case.reference(student=first[0], teacher=first[1], reduction="none")
        assert loss is not None
        assert abs(loss[0] - want[0]) <= 8 * torch.finfo(dtype).eps
        most = {"kl_div_with_logits": 80.0, "js_div_with_logits": 0.6931471805599453}
        assert abs(loss[1] - most.get(case.name, 1.0)) <= 8 * torch.finfo(dtype).eps * 80
        assert loss[2] == 0
        for grad in grads:
            assert grad is not None
            assert grad.isfinite().all(), grad
            assert (grad[2] == 0).all()
            assert grad[0, 2] == 0


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_far_distributions(case: RowCase, isa: str) -> None:
    """Logits apart by more than the digits of a probability."""
    for dtype, factor in itertools.product(DTYPES, (8.0, 15.0, 30.0)):
        sample = case.sample((6, 40), torch.float64, seed=2)
        both = {n: (t / 2 * factor) for n, t in sample.tensors.items()}
        far = sample.of(**both).to(dtype)
        compare(case, far, case.variations[0], f"times {factor}")


def test_sharp_focal_rows(isa: str) -> None:
    """Sure rows: the focal loss and its gradient are 0, not NaN, and entropy is."""
    for dtype, gamma in itertools.product(DTYPES, (0.0, 0.5, 1.0, 2.0, 3.5)):
        x = torch.tensor([[0.0, 3e4, 0], [3e4, 0, 0]], dtype=dtype).requires_grad_()
        target = torch.tensor([1, 1])
        loss = mbkern.functional.softmax_focal_loss(x, target, gamma, reduction="none")
        loss.backward(torch.ones_like(loss))
        assert x.grad is not None
        assert loss[0] == 0
        assert loss[1] == torch.tensor(3e4, dtype=dtype)
        assert torch.equal(x.grad[0], torch.zeros(3, dtype=dtype))
        assert torch.equal(x.grad[1], torch.tensor([1.0, -1, 0], dtype=dtype))
        x.grad = None
        mbkern.functional.entropy_with_logits(x, reduction="sum").backward()
        assert torch.equal(x.grad, torch.zeros(2, 3, dtype=dtype))
