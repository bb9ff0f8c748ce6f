"""Losses of rows have the same bits in every cut, layout, instruction set and number of threads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from row_calls import every_kernel
from row_case import RowCase, RowSample
from row_cases import KERNELS, direct
from row_results import every_dtype, same_bits
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("restored", "one_thread")


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
