"""Results of losses of rows beside their formula in fp64 and torch's, and their bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cases import DTYPES, REDUCTIONS, check
from row_case import RowCase, RowSample, Variation
from same_bits import same_bits as same_bits
from torch import Tensor

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

Result = list[Tensor | None]
Expected = tuple[Result, Result, tuple[float, ...]]


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
