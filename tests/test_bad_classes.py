"""A class that does not exist raises, with its value and place, before anything is written."""

from __future__ import annotations

import pytest
import torch
from guarded import Arena

import mbkern
from mbkern import functional as F

pytestmark = pytest.mark.cpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def bad_classes(dtype: torch.dtype, columns: int) -> list[int]:
    info = torch.iinfo(dtype)
    edges = [-1, -2, columns, columns + 1, info.min, info.min + 1, info.max, info.max - 1]
    if dtype is torch.int64:
        edges += [2**31, 2**32, 2**32 + 1, -(2**32), 2**62, -(2**31), 2**61 + 3]
    return sorted({v for v in edges if info.min <= v <= info.max and not 0 <= v < columns})


@pytest.mark.parametrize("index", INTEGERS, ids=str)
@pytest.mark.parametrize("columns", [5, 100, 700])
def test_bad_classes(columns: int, index: torch.dtype) -> None:
    """IndexError with the row and the value, for every kind of number that a class can be."""
    if columns > torch.iinfo(index).max:
        columns = torch.iinfo(index).max - 2
    for dtype in DTYPES:
        for number, bad in enumerate(bad_classes(index, columns)):
            arena = Arena(6, 8 * 9 * columns)
            arena.start(0, True)
            row = number % 9
            target = (torch.arange(9) % columns).to(index)
            target[row] = bad
            x = arena.copy(torch.ones(9, columns, dtype=dtype))
            placed, out = arena.copy(target), arena.output(torch.empty(9, columns), dtype)
            total = None if dtype is torch.float64 else mbkern.LossSum()
            with (
                pytest.raises(IndexError, match=f"target {bad} at flat index {row} ") as error,
                arena.allocating(),
            ):
                mbkern.loss_and_grad("cross_entropy", x, placed, grad_out=out, loss_sum=total)
            assert f"[0, {columns})" in str(error.value)
            for block in arena.blocks[2 : arena.used]:
                assert (block.bytes == 0xFF).all(), "an output was written"
            for inplace in (x, None):
                with pytest.raises(IndexError, match=f"target {bad} at flat index {row} "):
                    mbkern.loss_and_grad("cross_entropy", x, placed, grad_out=inplace)
            assert (x == 1).all()
            assert total is None or not total.state.any()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_bad_class_in_images(reduction: str) -> None:
    """The flat index counts the items of the unreduced loss, in the order of its indices."""
    x = torch.zeros(2, 3, 4, 5, requires_grad=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        target = torch.zeros(2, 4, 5, dtype=torch.int64)
        target[1, 2, 3] = 3
        with pytest.raises(IndexError, match="target 3 at flat index 33 "):
            F.cross_entropy(x.contiguous(memory_format=layout), target, reduction=reduction)
        transposed = torch.zeros(2, 5, 4, dtype=torch.int64).transpose(1, 2)
        transposed[1, 2, 3] = -7
        with pytest.raises(IndexError, match="target -7 at flat index 33 "):
            F.cross_entropy(x.contiguous(memory_format=layout), transposed, reduction=reduction)


def test_the_first_bad_class_is_named() -> None:
    target = torch.zeros(100_000, dtype=torch.int64)
    target[77_777], target[99_999], target[80_000] = 9, 10, 11
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pytest.raises(IndexError, match="target 9 at flat index 77777 "):
                F.cross_entropy(torch.zeros(100_000, 3), target)
    finally:
        torch.set_num_threads(before)


def test_ignore_index_may_be_any_number() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    want = F.cross_entropy(x[1:], torch.tensor([0, 1, 2]), reduction="none")
    for ignored in (-1, -100, 3, 2**32, 2**63 - 1, -(2**63)):
        target = torch.tensor([ignored, 0, 1, 2])
        loss = F.cross_entropy(x, target, ignore_index=ignored, reduction="none")
        assert loss.tolist() == [0.0, *want.tolist()]
    with pytest.raises(IndexError, match=f"target {2**32 + 3} at flat index 0"):
        F.cross_entropy(x, torch.tensor([2**32 + 3, 0, 1, 2]), ignore_index=3)
