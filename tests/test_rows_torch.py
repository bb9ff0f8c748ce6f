"""Losses of rows beside torch's: modules, torch's own samples, and patched()."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, check
from row_calls import (
    HALF,
    every_case,
    every_stock_case,
    through_autograd,
)
from row_case import RowCase
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import mbkern

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- modules and torch's samples -----------------------------------------------------------------


@every_case
def test_modules(case: RowCase) -> None:
    """A constructor's options reach the function; tensors come with the call."""
    for variation in case.variations:
        sample = case.sample((6, 9), torch.float32, variation)
        options = dict(sample.options)
        later = {n: options.pop(n) for n in ("sample_weight", "target") if n in options}
        module = case.module(**options, loss_dtype=torch.float64)
        got = module(*sample.tensors.values(), **later)
        want = case.function(**sample.tensors, **sample.options, loss_dtype=torch.float64)
        assert got.dtype is torch.float64
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), variation.name


OPS = {
    op.name: op for op in op_db if op.name.startswith("nn.functional.") and not op.variant_test_name
}
MODULES = {info.module_cls: info for info in module_db}
Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


def with_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A detached copy, floating tensors in another dtype."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    return value.to(dtype) if value.is_floating_point() else value


def samples(case: RowCase, dtype: torch.dtype) -> list[tuple[str, Call, Call]]:
    """Every OpInfo and ModuleInfo sample as (description, our call, torch's call)."""
    torch.manual_seed(0)
    random.seed(0)
    calls: list[tuple[str, Call, Call]] = []
    op = OPS.get(f"nn.functional.{case.name}")
    entries = op.sample_inputs("cpu", torch.float64) if op is not None else ()
    for sample in entries:
        args = tuple(with_dtype(a, dtype) for a in (sample.input, *sample.args))
        kwargs = {k: with_dtype(v, dtype) for k, v in sample.kwargs.items()}
        text = f"{case.name}{[tuple(a.shape) for a in args]} {list(kwargs)}"
        calls.append((text, (case.function, args, kwargs), (case.torch, args, kwargs)))
    stock_class = next(c for c in case.module.__mro__ if c.__module__.startswith("torch."))
    info = MODULES.get(stock_class)  # there is none of TripletMarginLoss
    modules = (
        info.module_inputs_func(info, "cpu", torch.float32, False, training=True) if info else ()
    )
    for entry in modules:
        make, call = entry.constructor_input, entry.forward_input
        options = {k: with_dtype(v, dtype) for k, v in make.kwargs.items()}
        args = tuple(with_dtype(a, dtype) for a in call.args)
        text = f"{case.module.__name__} {entry.desc} {[tuple(a.shape) for a in args]}"
        mine, stock = (cls(*make.args, **options) for cls in (case.module, stock_class))
        calls.append((text, (mine, args, call.kwargs), (stock, args, call.kwargs)))
    return calls


def results(call: Call, dtype: torch.dtype) -> list[Tensor | None]:
    """Loss, and gradients of the floating tensors from an incoming gradient of small integers."""
    function, args, kwargs = call
    if isinstance(function, torch.nn.Module):
        function = function.to(dtype)
    kwargs = {k: with_dtype(v, dtype) for k, v in kwargs.items()}
    leaves = [with_dtype(a, dtype) for a in args]
    count = {"cosine_embedding_loss": 2}.get(getattr(function, "__name__", ""), len(leaves))
    count = 2 if isinstance(function, torch.nn.CosineEmbeddingLoss) else count
    leaves = [a.requires_grad_(k < count and a.is_floating_point()) for k, a in enumerate(leaves)]
    loss = function(*leaves, **kwargs)
    incoming = torch.arange(loss.numel()).reshape(loss.shape) % 5 - 1
    loss.backward(incoming.to(loss.dtype) + (loss.dim() == 0) * 2)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@every_stock_case
def test_torch_samples(case: RowCase, dtype: torch.dtype) -> None:
    """In the dtypes that torch's function has; p other than 2 is refused."""
    count = 0
    for text, mine, stock in samples(case, dtype):
        p = mine[2].get("p", getattr(mine[0], "p", 2))
        if case.name == "triplet_margin_loss" and p != 2:
            with pytest.raises(ValueError, match="p = 2 only"):
                results(mine, dtype)
            continue
        weight = mine[2].get("weight")
        by_element = "soft_margin" in case.name and weight is not None and weight.dim() != 1
        one = case.name == "multi_margin_loss" and mine[1][0].dim() == 1 == mine[1][1].dim()
        if mine[1][0].dim() == 0 or by_element or one:  # no row, weights of elements, (C) with (1)
            message = r"^mbkern: .* (of rows|one entry for each|has shape \(1,\))"
            with pytest.raises(ValueError, match=message):
                results(mine, dtype)
            continue
        try:
            theirs = results(stock, dtype)
        except RuntimeError as error:
            assert "not implemented for" in str(error), text  # noqa: PT017
            continue
        count += 1
        got, want = results(mine, dtype), results(stock, torch.float64)
        magnitude = 2 + max(a.abs().max().item() if a.numel() else 0 for a in mine[1])
        for k, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
            assert (g is None) == (t is None), f"{text}: gradient {k} is {g}"
            if g is not None and w is not None:
                check(g, w, t, f"{text} {dtype}: {k}", magnitude)
    assert count >= 6 or dtype in HALF, count


# ---- patched() -----------------------------------------------------------------------------------


@every_stock_case
def test_patched(case: RowCase) -> None:
    """Torch's functions run here where the call is the same, and the report says so."""
    function = getattr(F, case.name)
    for variation in case.variations:
        if not variation.torch:
            continue
        sample = case.sample((6, 9), torch.float32, variation)
        want = through_autograd(case, sample)
        leaves_of, leaves = case.leaves(sample)
        with mbkern.patched(report=True) as report:
            loss = getattr(F, case.name)(**leaves_of.tensors, **sample.options)
        got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        assert report.taken == {case.name: 1}, f"{variation.name}: {report}"
        assert all(map(torch.equal, (t.nan_to_num() for t in got), (t.nan_to_num() for t in want)))
    assert getattr(F, case.name) is function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_stock_case
def test_patched_samples(case: RowCase, dtype: torch.dtype) -> None:
    """Every sample of torch's tests has torch's result, by whichever library."""
    count = 0
    with mbkern.patched(report=True) as report:
        for text, _, (function, args, kwargs) in samples(case, dtype):
            named = getattr(function, "__name__", "")
            called = getattr(F, case.name) if named == case.name else function
            got = results((called, args, kwargs), dtype)
            with torch._C.DisableTorchFunction():
                want = results((function, args, kwargs), torch.float64)
            for g, w in zip(got, want, strict=True):
                assert (g is None) == (w is None), text
                if g is not None and w is not None:
                    torch.testing.assert_close(g, w.to(dtype), equal_nan=True, msg=text)
            count += 1
    assert report.taken[case.name] >= count / 4, str(report)


@every_stock_case
def test_patched_passes_on(case: RowCase) -> None:
    """What torch has and mbkern has not, and what torch refuses: torch's own results and errors."""
    function = getattr(F, case.name)
    sample = case.sample((6, 9))
    calls: list[dict[str, Any]] = [{case.inputs[0]: sample.tensors[case.inputs[0]][:4]}]
    if case.name == "triplet_margin_loss":
        calls += [{"p": 1.0}, {"p": 3.0}]
    if case.name == "multilabel_soft_margin_loss":
        calls += [{n: torch.rand(2, 3, 4) for n in case.inputs}]
    if "target" in sample.tensors and not sample.tensors["target"].is_floating_point():
        calls += [{"target": sample.tensors["target"] + 90}]
    for change in calls:
        outcomes = []
        for patch in (False, True):
            with mbkern.patched(report=True) as report:
                called = getattr(F, case.name) if patch else function
                try:
                    outcomes.append(called(**sample.tensors | change))
                except Exception as error:
                    outcomes.append((type(error), str(error)))
        assert not report.taken, f"{list(change)}: {report}"
        if isinstance(outcomes[0], Tensor):
            assert torch.equal(*outcomes)
        else:
            assert outcomes[0] == outcomes[1]
