"""What losses of rows refuse, with the values in the message, and nothing written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from row_calls import (
    CASE,
    every_case,
)
from row_case import RowCase
from row_cases import ROW_CASES, direct

import mbkern
from mbkern import loss_and_grad

pytestmark = pytest.mark.usefixtures("one_thread")


INDEXED = [case for case in ROW_CASES if case.name in (
    "nll_loss", "multi_margin_loss", "softmax_focal_loss", "info_nce_loss"
)]  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("case", INDEXED, ids=lambda case: case.name)
def test_bad_classes(case: RowCase, isa: str) -> None:
    """The message has the row and the value, and nothing is written."""
    for dtype, columns, bad in itertools.product(DTYPES, (5, 70, 1100), (-1, None, 2**40)):
        value = columns if bad is None else bad
        sample = case.sample((9, columns), dtype)
        target = sample.tensors["target"].clone()
        target[6], target[8] = value, value
        bad_sample = sample.of(target=target)
        seen, _ = case.leaves(bad_sample)
        with pytest.raises(IndexError, match=f"target {value} at flat index 6"):
            case.function(**seen.tensors)
        if case.registered:
            out = torch.full((9, columns), 7.0, dtype=dtype)
            tensors, _ = direct(case, bad_sample)
            total = mbkern.LossSum()
            more = {"loss_sum": total} if dtype is not torch.float64 else {}
            with pytest.raises(IndexError, match=f"target {value} at flat index 6"):
                loss_and_grad(case.name, *tensors, grad_out=out, **more)
            assert (out == 7).all()
            assert not total.state.any()


@pytest.mark.cpu
def test_bad_lists(isa: str) -> None:
    case = CASE["multilabel_margin_loss"]
    for columns, bad in itertools.product((5, 70, 1100), (-2, None, 2**40)):
        value = columns if bad is None else bad
        sample = case.sample((9, columns))
        target = torch.full((9, columns), -1)
        target[:, 0] = 2
        target[6, 1] = value
        out = torch.full((9, columns), 7.0)
        with pytest.raises(IndexError, match=rf"{value} at (flat index {6 * columns + 1}|row 6)\b"):
            loss_and_grad(case.name, sample.tensors["input"], target, grad_out=out)
        assert (out == 7).all()
        with pytest.raises((IndexError, RuntimeError)):  # torch's too
            F.multilabel_margin_loss(sample.tensors["input"], target)


@every_case
def test_wrong_tensors(case: RowCase) -> None:
    """Values and shapes are in the messages."""
    sample = case.sample((6, 70))
    refused = (ValueError, TypeError, RuntimeError, IndexError)
    for name in case.inputs:
        t = sample.tensors[name]
        for wrong in (t[:4], t[:, :3], t[..., None], t[0, 0], t.to(torch.complex64)):
            if case.name == "entropy_with_logits" and wrong.dim() and not wrong.is_complex():
                continue  # alone, these are right
            with pytest.raises(refused, match=r"^mbkern: "):
                case.function(**sample.of(**{name: wrong}).tensors)
    target = sample.tensors.get("target", torch.arange(6))
    if case.inputs[-1] not in ("target", "negative"):
        for wrong in (target[:4], target[None], target.to(torch.complex64)):
            with pytest.raises(refused, match=r"^mbkern: "):
                case.function(**sample.of(target=wrong).tensors)
    for name, value in (("sample_weight", torch.ones(7)), ("denominator", torch.ones(3))):
        with pytest.raises(refused, match=r"^mbkern: "):
            case.function(**sample.tensors, **{name: value})
    with pytest.raises(TypeError, match="weird"):
        case.function(**sample.tensors, weird=1)
    for reduction in ("average", "batchmean"):
        with pytest.raises(ValueError, match="is not a valid reduction"):
            case.function(**sample.tensors, reduction=reduction)
    with pytest.raises(ValueError, match="denominator goes with reduction='mean'"):
        case.function(**sample.tensors, reduction="sum", denominator=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("triplet_margin_loss", {"p": 3}, "p = 2 only, not 3"),
        ("triplet_margin_loss", {"p": 1.0}, "p = 2 only, not 1.0"),
        ("multi_margin_loss", {"p": 3}, "p must be 1 or 2, not 3"),
        ("multi_margin_loss", {"p": 1.5}, "p must be 1 or 2, not 1.5"),
        ("multi_margin_loss", {"weight": torch.ones(3)}, "weight"),
        ("nll_loss", {"weight": torch.ones(3)}, "weight"),
        ("dice_loss", {"smooth": -1.0}, "smooth must be"),
        ("softmax_focal_loss", {"gamma": -1.0}, "gamma must be"),
        ("js_div_with_logits", {"beta": 1.5}, "beta must be"),
        ("js_div_with_logits", {"beta": -0.1}, "beta must be"),
        ("kl_div_with_logits", {"direction": "backward"}, "direction must be 'forward' or 'rev"),
        *(
            (case.name, {"temperature": value}, "temperature must be")
            for case in ROW_CASES
            for value in (0.0, -1.0, float("nan"))
            if any("temperature" in v.options for v in case.variations)
        ),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASE[name].function(**CASE[name].sample((6, 70)).tensors, **options)


def test_info_nce_without_a_target() -> None:
    """Key i belongs to query i; more queries than keys need a target."""
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    got = mbkern.functional.info_nce_loss(x, temperature=0.1)
    torch.testing.assert_close(got, F.cross_entropy(x / 0.1, torch.arange(5)))
    with pytest.raises(ValueError, match="9 queries have only 5 keys"):
        mbkern.functional.info_nce_loss(x.T)
    for wrong in (x[0], x[None]):
        with pytest.raises(ValueError, match="similarity must be"):
            mbkern.functional.info_nce_loss(wrong)
