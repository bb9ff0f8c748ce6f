"""Losses of rows of several tensors beside their formulas in fp64, in every size and layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from row_calls import every_case
from row_case import RowCase
from row_cases import KERNELS
from row_results import build, compare, differentiate, every_dtype, same_bits
from torch import Tensor

import mbkern

pytestmark = pytest.mark.usefixtures("one_thread")
COLUMNS = (1, 2, 3, 16, 17, 63, 64, 65, 129, 1000, 1025, 2049)


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
