"""The registered operators keep torch's rules for operators, all four of its checks."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import library
from torch.utils import _pytree as pytree

import mbkern
from mbkern import _ops

pytestmark = pytest.mark.usefixtures("one_thread")

REDUCTION_AND_FORM = [("none", False), ("mean", False), ("sum", False), ("mean", True)]


def check(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, registration for autograd, fake tensors, and tracing with symbolic shapes."""
    with warnings.catch_warnings():  # torch 2.14's own check reads .grad of what is no leaf
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        results = library.opcheck(operator, arguments)
    assert set(results) == {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("reduction", "form"), REDUCTION_AND_FORM)
def test_operators(case: Case, reduction: str, form: bool) -> None:
    for dtype, grad in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        variation = {v.name: v for v in case.variations}.get("positive", case.variations[0])
        sample = case.sample((5, 7), dtype, None if case.has_rows else variation)
        x, target = sample.input.requires_grad_(grad), sample.target
        if case.has_rows:
            weights: tuple[Any, ...] = (torch.rand(7), torch.rand(5))
            options: tuple[Any, ...] = (case.name, reduction, 3, 0.1, 0.01, 5.0)
            forward, backward = _ops.row_loss, _ops.row_loss_backward
            ask: tuple[bool, ...] = (form,)
        else:
            loss = next(loss for loss in mbkern.losses() if loss.name == case.name)
            third = (*case.tensors(sample).values(), None)[2]
            weight = torch.rand(5, 7) if loss.weight == "rescale" else None
            weights = (third, None, weight, torch.rand(5, 7))
            options = (case.name, reduction, -100, loss.numbers())
            forward, backward = _ops.tensor_loss, _ops.tensor_loss_backward
            ask = (form, form and "target" in loss.differentiable, False)
        hint = torch.tensor(2.0) if form else None
        tensors = (x, target, *weights)
        check(forward, (*tensors, None, hint, *options, *ask, dtype))
        with torch.no_grad():
            value, *saved = forward(*tensors, None, hint, *options, *ask, dtype)
        need = () if case.has_rows else (True, *ask[1:])
        arguments = (
            torch.full_like(value, 0.5), *tensors, hint, *saved, *options, form, *need
        )  # fmt: skip
        if grad:
            with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
                torch.autograd.grad(pytree.tree_leaves(backward(*arguments))[0].sum(), x)
        else:
            check(backward, arguments)
