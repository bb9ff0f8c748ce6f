"""mbkern.patched(): which calls are run here, bit by bit, and which on torch."""

from __future__ import annotations

import functools
import inspect
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, REDUCTIONS, Case
from patched_inputs import (
    OPS,
    ORIGINALS,
    OURS,
    T,
    W,
    X,
    Y,
    by_torch,
    every_loss,
    every_way,
    in_a_thread,
    outcome,
    same,
)
from torch import Tensor
from torch.nn.functional import cross_entropy as imported_cross_entropy
from torch.nn.functional import mse_loss as imported_mse_loss
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_modules import module_db

import mbkern
from mbkern import _patched, _patched_calls
from mbkern._patched import patched

pytestmark = pytest.mark.usefixtures("one_thread", "patches_taken_back")


# ---- what is passed on --------------------------------------------------------------------------


class Subclass(Tensor):
    """A tensor with its own type and no overrides."""


def requires_grad(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


LOGITS = X[:, :5].contiguous()
LABELS = T % 5
IMAGE = torch.randn(2, 3, 4, 5)

PASSED_ON: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("cross_entropy", (X, T), {"weight": requires_grad(W)}, "weight requires grad"),
    ("cross_entropy", (X, T), {"weight": W.double()}, "weight is float64, input float32"),
    ("cross_entropy", (X, T), {"weight": W[1:]}, "weight's shape"),
    ("cross_entropy", (X, T), {"weight": [1.0] * 37}, "weight"),
    ("cross_entropy", (X.to(torch.complex64), T), {}, "input is complex64"),
    ("cross_entropy", (X > 0, T), {}, "input is bool"),
    ("cross_entropy", (X, T.int()), {}, "target is int32"),
    ("cross_entropy", (X, T.byte()), {}, "target is uint8"),
    ("cross_entropy", (X, T > 0), {}, "target is bool"),
    ("cross_entropy", (X, T[1:]), {}, "target's shape"),
    ("cross_entropy", (X, T[:, None]), {}, "target's shape"),
    ("cross_entropy", (X[0, 0], T[0]), {}, "input has no class dimension"),
    ("cross_entropy", (X[:, :0], T), {}, "no classes"),
    ("cross_entropy", (X, Y.softmax(1).double()), {}, "target is float64, input float32"),
    (
        "cross_entropy",
        (X, Y.softmax(1), None, None, 1),
        {},
        "ignore_index with class probabilities",
    ),
    ("cross_entropy", (X.as_subclass(Subclass), T), {}, "input is a Subclass"),
    ("cross_entropy", (X.to("meta"), T.to("meta")), {}, "input is on meta"),
    ("cross_entropy", (X.to_sparse(), T), {}, "input is not strided"),
    ("cross_entropy", ([1.0], T), {}, "input is a list"),
    ("cross_entropy", (X, T), {"reduction": "batchmean"}, "reduction"),
    ("cross_entropy", (X, T), {"reduction": None}, "reduction"),
    ("cross_entropy", (X, T), {"size_average": True}, "size_average"),
    ("cross_entropy", (X, T), {"reduce": False}, "reduce"),
    ("cross_entropy", (X, T), {"label_smoothing": 1.5}, "label_smoothing"),
    ("cross_entropy", (X, T), {"label_smoothing": "0"}, "label_smoothing"),
    ("cross_entropy", (X, T), {"ignore_index": 1.0}, "ignore_index"),
    ("cross_entropy", (X, T), {"ignore_index": 2**63}, "ignore_index"),
    ("cross_entropy", (X, T), {"sample_weight": T}, "no option sample_weight"),
    ("cross_entropy", (X,), {}, "arguments of no loss"),
    ("cross_entropy", (X, T), {"input": X}, "no option input"),
    ("cross_entropy", (X, T, None, None, 1), {"ignore_index": 1}, "arguments of no loss"),
    ("cross_entropy", (X, T, *[None] * 9), {}, "arguments of no loss"),
    ("cross_entropy", (X, T + 37), {}, "refused by mbkern"),
    ("cross_entropy", (X, T - 1), {}, "refused by mbkern"),
    ("mse_loss", (X, Y[0]), {}, "input and target differ in shape"),
    ("mse_loss", (X, Y[1:]), {}, "input and target differ in shape"),
    ("mse_loss", (X, Y.double()), {}, "target is float64, input float32"),
    ("mse_loss", (X.to(torch.complex64), Y), {}, "input is complex64"),
    ("mse_loss", (T, T), {}, "input is int64"),
    ("mse_loss", (X, T[:, None].expand(64, 37)), {}, "target is int64, input float32"),
    ("mse_loss", (X, Y), {"weight": requires_grad(X)}, "weight requires grad"),
    ("mse_loss", (X, Y), {"weight": X[0]}, "weight's shape"),
    ("mse_loss", (X, Y), {"weight": X.half()}, "weight is float16, input float32"),
    ("mse_loss", (X, Y.as_subclass(Subclass)), {}, "target is a Subclass"),
    ("mse_loss", (X.to("meta"), Y.to("meta")), {}, "input is on meta"),
]


@pytest.mark.cpu
@every_way
@pytest.mark.parametrize(
    ("name", "args", "kwargs", "reason"),
    PASSED_ON,
    ids=[f"{name}: {reason}" for name, _, _, reason in PASSED_ON],
)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:size_average and reduce")
def test_passed_on(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str, mode: bool
) -> None:
    """Torch's very result, or its very error, and the reason is counted."""
    entry = next(entry for entry, _ in _patched._table() if entry.name == name)
    want = outcome(ORIGINALS[name], *args, **kwargs)
    with patched(mode=mode, report=True) as report:
        got = outcome(getattr(F, name), *args, **kwargs)
    if isinstance(want, Tensor) and want.is_meta:
        assert got.is_meta
        assert got.shape == want.shape
    else:
        assert same(got, want), f"{got} is not {want}"
    if mode and (len(args) < 2 or "argument" in reason or "no option" in reason):
        return  # torch's own signature refuses these before a mode is asked
    assert report.passed_on == {(name, reason): 1} or mode
    assert not report.taken
    if reason != "refused by mbkern":
        assert _patched_calls.refusal(entry, args, kwargs) == reason


TAKEN: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("cross_entropy", (X, T), {}),
    ("cross_entropy", (X, T, W), {}),
    ("cross_entropy", (X, T, W, None, 3, None, "sum", 0.1), {}),
    ("cross_entropy", (), {"target": T, "input": X}),
    ("cross_entropy", (X,), {"target": T, "label_smoothing": 1, "reduction": "none"}),
    ("cross_entropy", (X[0], T[0]), {}),
    ("cross_entropy", (X, Y.softmax(1)), {"weight": W}),
    ("cross_entropy", (IMAGE, torch.randint(3, (2, 4, 5))), {"ignore_index": 1}),
    ("cross_entropy", (X.t().contiguous().t(), T), {}),
    ("cross_entropy", (X.bfloat16(), T), {"weight": W.bfloat16()}),
    ("cross_entropy", (X.half(), T), {"reduction": "none"}),
    ("cross_entropy", (X.double(), T), {"weight": W.double()}),
    ("cross_entropy", (torch.nn.Parameter(X), T), {}),
    ("mse_loss", (X, Y), {}),
    ("mse_loss", (X, Y, None, None, "sum", X * X), {}),
    ("mse_loss", (X[0, 0], Y[0, 0]), {"reduction": "none"}),
    ("mse_loss", (X.bfloat16(), Y.bfloat16()), {}),
]


@every_way
def test_taken(mode: bool) -> None:
    """Our bits, counted, close to torch."""
    for count, (name, args, kwargs) in enumerate(TAKEN, 1):
        with patched(mode=mode, report=True) as report:
            got = getattr(F, name)(*args, **kwargs)
        assert report.taken == {name: 1}, (count, report.passed_on)
        assert not report.passed_on
        assert torch.equal(got, OURS[name](*args, **kwargs)), count
        want = ORIGINALS[name](*args, **kwargs)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


NEW = [case for case in CASES if case.torch is not None and case.name not in ORIGINALS]


@every_way
@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")  # of kl_div
@pytest.mark.parametrize("case", NEW, ids=lambda case: case.name)
def test_every_loss_is_taken(case: Case, mode: bool) -> None:
    """With all its options and reductions; a target of another shape or dtype is torch's."""
    original = getattr(F, case.name)
    ours = getattr(mbkern.functional, case.name)
    for variation, reduction in itertools.product(case.variations, REDUCTIONS):
        if not variation.torch:
            continue
        sample = case.sample((6, 7), torch.float32, variation)
        names = [n for n in case.arguments if n in inspect.signature(original).parameters][:3]
        tensors = case.tensors(sample)
        args = tuple(tensors.pop(n) for n in names if n != "pos_weight")
        kwargs = {n: v for n, v in sample.options.items() if n not in names or n == "pos_weight"}
        kwargs["reduction"] = reduction
        with patched(mode=mode, report=True) as report:
            got = getattr(F, case.name)(*args, **kwargs)
        label = f"{variation.name} {reduction}"
        assert report.taken == {case.name: 1}, f"{label}: {report.passed_on}"
        assert torch.equal(got, ours(*args, **kwargs)), label
        torch.testing.assert_close(got, original(*args, **kwargs))
    other = (args[0], args[1].double(), *args[2:])
    with patched(mode=mode, report=True) as report:
        got = outcome(getattr(F, case.name), *other, **kwargs)
    assert not report.taken
    reasons = [reason for name, reason in report.passed_on if name == case.name]
    assert mode or (len(reasons) == 1 and "is float64, input float32" in reasons[0])
    assert same(got, outcome(original, *other, **kwargs))


def test_autocast() -> None:
    """Weights that autocast converts are taken; where it leaves a product alone, torch is asked."""
    x, y = X.bfloat16(), Y.bfloat16()
    with patched(report=True) as report, torch.autocast("cpu"):
        for args, kwargs in (((x, T), {}), ((x, T), {"weight": W}), ((x, Y.softmax(1)), {})):
            got = F.cross_entropy(*args, **kwargs)
            assert got.dtype is torch.float32
            torch.testing.assert_close(got, imported_cross_entropy(*args, **kwargs))
        assert F.mse_loss(x, Y).dtype is torch.float32
        assert F.mse_loss(x, y, weight=x).dtype is imported_mse_loss(x, y, weight=x).dtype
        with pytest.raises(RuntimeError):
            F.cross_entropy(x, T, W.double())
    assert report.taken == {"cross_entropy": 3, "mse_loss": 1}
    assert report.passed_on == {
        ("mse_loss", "weight under autocast"): 1,
        ("cross_entropy", "weight is float64, input bfloat16"): 1,
    }


def test_weights_do_not_lose_derivatives() -> None:
    """Also where the weight does not say that it is differentiated."""

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        def total(w: Tensor) -> Tensor:
            one = functools.partial(function, X, T, reduction="sum")
            return torch.func.vmap(lambda v: one(weight=v))(w).sum()

        result: Tensor = torch.func.grad(total)(torch.stack([W, W]))
        return result

    want = gradient(imported_cross_entropy)
    assert want.abs().max() > 0
    with patched(report=True) as report:
        assert torch.equal(gradient(lambda *a, **k: F.cross_entropy(*a, **k)), want)
    assert report.passed_on == {("cross_entropy", "weight under a transform"): 1}


def test_what_modes_and_subclasses_are_handed() -> None:
    """torch's function, by which they know it, not the wrapper."""
    seen: list[Any] = []

    class Override(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return "overridden"

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with patched():
        assert F.cross_entropy(X.as_subclass(Override), T) == "overridden"
        assert in_a_thread(lambda: F.mse_loss(X.as_subclass(Override), Y)) == "overridden"
        assert seen == [imported_cross_entropy, imported_mse_loss]
        seen.clear()
        with Watch():
            F.mse_loss(X, Y.double())
        assert imported_mse_loss in seen
        assert F.mse_loss not in seen


# ---- torch's own samples ------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_loss
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:size_average and reduce")
def test_torch_samples(name: str, dtype: torch.dtype, mode: bool) -> None:
    torch.manual_seed(0)
    random.seed(0)
    total = 0
    with patched(mode=mode, report=True) as report:
        for sample in OPS[name].sample_inputs("cpu", dtype, True):
            total += 1
            leaves = [sample.input, *(a for a in sample.args if a.requires_grad)]
            results = []
            for function in (getattr(F, name), functools.partial(by_torch, name)):
                loss = function(sample.input, *sample.args, **sample.kwargs)
                incoming = torch.linspace(-1, 2, max(loss.numel(), 1), dtype=dtype)
                incoming = incoming[: loss.numel()].reshape(loss.shape)
                results.append([loss, *torch.autograd.grad(loss, leaves, incoming)])
            torch.testing.assert_close(*results)
    assert total >= {"cross_entropy": 20, "mse_loss": 5}[name]
    assert report.taken[name] >= 0.5 * total, str(report)


@every_way
def test_torch_error_inputs(mode: bool) -> None:
    """Those of torch's module, as its functions have none, and of functions that get some."""
    info = next(info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)
    if info.module_error_inputs_func is None:
        pytest.skip("NOT CHECKED: this torch has no such inputs")
    errors = list(info.module_error_inputs_func(info, "cpu", torch.float32, False, training=True))
    assert len(errors) >= 7
    with patched(mode=mode):
        for error in errors:
            make = error.module_error_input.constructor_input
            call = error.module_error_input.forward_input
            with pytest.raises(error.error_type, match=error.error_regex):
                torch.nn.CrossEntropyLoss(*make.args, **make.kwargs)(*call.args, **call.kwargs)
        for name in ORIGINALS:
            function = OPS[name].error_inputs_func
            for error in () if function is None else OPS[name].error_inputs("cpu"):
                sample = error.sample_input
                with pytest.raises(error.error_type, match=error.error_regex):
                    getattr(F, name)(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.cpu
@every_way
def test_class_index_out_of_range(mode: bool) -> None:
    """Found by the kernel only; the error is torch's all the same."""
    calls = ((X, T + 37), (X, T - 1), (X[0], T[0] + 37), (IMAGE, IMAGE[:, 0].long() + 9))
    with patched(mode=mode):
        for args in calls:
            want = outcome(by_torch, "cross_entropy", *args)
            assert outcome(lambda *a: F.cross_entropy(*a), *args) == want
            assert want[0] is IndexError
