"""What the tests of losses of rows share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from row_case import RowCase, RowSample, Variation
from row_cases import KERNELS, ROW_CASES
from torch import Tensor

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
