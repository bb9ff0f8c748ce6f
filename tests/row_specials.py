"""Rows in which one or two elements are zeros, denormals, huge numbers, infinities or NaN."""

from __future__ import annotations

import itertools
import math

import row_formulas as formulas
import row_tensors as tensors
import torch
import torch.nn.functional as F
from row_case import RowCase, RowSample, Variation
from row_cases import ROW_CASES
from row_exact import computed
from torch import Tensor

import mbkern

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COLUMNS = (2, 3, 17, 40, 1100)  # no whole vector, tails, groups of vectors, a long row

CROSS_ENTROPY = RowCase(
    "cross_entropy", ("input",), formulas.focal, F.cross_entropy, mbkern.nn.CrossEntropyLoss,
    tensors.logits, (
        Variation("plain"), Variation("weight", {"weight": tensors.class_weight}),
        Variation("ignored", {"target": tensors.none_left}),
    ),
)  # fmt: skip
CASES = (CROSS_ENTROPY, *ROW_CASES)
CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss", "softmax_focal_loss", "info_nce_loss")


def specials(dtype: torch.dtype, largest: float | None = None) -> Tensor:
    """With ``largest`` in place of the type's largest number."""
    info = torch.finfo(dtype)
    least, most = info.smallest_normal * info.eps, largest or info.max
    sizes = (0.0, least, info.smallest_normal, 1.0, 100.0, most, math.inf)
    values = [*(s * v for v in sizes for s in (1, -1)), math.nan]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def largest(case: RowCase, dtype: torch.dtype) -> float:
    """What the formula in fp64 does not overflow with: in fp64 it would, on its way."""
    most = torch.finfo(dtype).max * (2.0**-16 if dtype is torch.float64 else 1)
    # log p - log t must be a number of the type, also over a temperature
    return most / 16 if case.name == "kl_div_with_logits" else most


def places(case: RowCase, columns: int) -> list[tuple[int, tuple[str, int], tuple[str, int], int]]:
    """Which elements are special, and the target class: the special ones and another."""
    few = [0, 1, columns - 1] if columns <= 3 else [columns // 2, columns - 1]
    elements = list(itertools.product(case.inputs, dict.fromkeys(few)))
    found = []
    for a, b in (*itertools.combinations(elements, 2), *zip(elements, elements, strict=True)):
        classes = sorted({a[1], b[1], 0}) if case.name in CLASSES else [0]
        found += [(a, b, t) for t in classes]
    return found


def rows(
    case: RowCase, values: Tensor, columns: int, variation: Variation, step: int = 11
) -> RowSample:
    """Every pair of values at every pair of places; of long rows one in ``step``."""
    dtype = values.dtype
    pairs = torch.cartesian_prod(torch.arange(len(values)), torch.arange(len(values)))
    if columns > 40:  # a part of them, another in each dtype
        pairs = pairs[DTYPES.index(dtype) :: step]
    where = places(case, columns)
    count = len(pairs) * len(where)
    sample = case.sample((count, columns), dtype, variation, seed=columns)
    rest = sample.tensors
    for k, (a, b, t) in enumerate(where):
        piece = slice(k * len(pairs), (k + 1) * len(pairs))
        for (name, column), which in ((a, 0), (b, 1)):
            rest[name][piece, column] = values[pairs[:, which]]
        if case.name in CLASSES:
            rest["target"][piece] = t
    if case.name == "cosine_embedding_loss":
        rest["target"][::2] = -rest["target"][::2].abs()
    return in_domain(case, sample)


def in_domain(case: RowCase, sample: RowSample) -> RowSample:
    """Without targets that the loss is not for."""
    kept = torch.ones(len(next(iter(sample.tensors.values()))), dtype=torch.bool)
    if case.name in ("multilabel_soft_margin_loss", "dice_loss"):
        shares = case.inputs if case.name == "dice_loss" else ("target",)
        for x in (sample.tensors[name] for name in shares):
            kept &= ~((x < 0) | ((x > 1) & x.isfinite())).any(-1)
    return chosen(sample, kept)


def chosen(sample: RowSample, kept: Tensor) -> RowSample:
    return RowSample({n: t[kept] for n, t in sample.tensors.items()}, sample.options)


def judged(case: RowCase, sample: RowSample) -> Tensor:
    """Which rows have the exact result; of the others it is asked that they are always the same."""
    given = list(sample.tensors.values())
    dtype, kept = given[0].dtype, torch.ones(len(given[0]), dtype=torch.bool)
    sizes = [t.abs().nan_to_num(0, 0, 0).double() for t in given[: len(case.inputs)]]
    if case.name == "cosine_embedding_loss":  # squares are numbers: beyond, torch has NaN as well
        for x in sizes:
            kept &= (x < 1e150).all(-1)
    if case.name == "triplet_margin_loss":  # see test_triplets_farther_apart_than_numbers
        for x, y in itertools.combinations(given, 2):
            infinite = (x.to(computed(dtype)) - y.to(computed(dtype))).isinf()
            kept &= ~(infinite & x.isfinite() & y.isfinite()).any(-1)
    return kept
