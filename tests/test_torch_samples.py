"""torch's own test samples (OpInfo, ModuleInfo) give torch's results; the modules are drop-in."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, Case, check
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = {
    op.name: op for op in op_db if op.name.startswith("nn.functional.") and not op.variant_test_name
}
MODULES = {info.module_cls: info for info in module_db}
STOCK = [case for case in CASES if case.torch is not None]
every_stock_case = pytest.mark.parametrize("case", STOCK, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


def with_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A detached copy, floating tensors in another dtype."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    return value.to(dtype) if value.is_floating_point() else value


def samples(case: Case, dtype: torch.dtype) -> list[tuple[str, Call, Call]]:
    """Every sample as (description, our call, torch's call)."""
    torch.manual_seed(0)
    random.seed(0)
    calls: list[tuple[str, Call, Call]] = []
    for sample in OPS[f"nn.functional.{case.name}"].sample_inputs("cpu", dtype):
        args = (sample.input, *sample.args)
        text = f"{case.name}{[tuple(a.shape) for a in args]} {sample.kwargs}"
        assert case.torch is not None
        calls.append(
            (text, (case.function, args, sample.kwargs), (case.torch, args, sample.kwargs))
        )
    info = MODULES[case.torch_module]
    # Made in fp32, as some of torch's generators know no other dtype, and rounded.
    inputs = info.module_inputs_func(info, "cpu", torch.float32, False, training=True)
    for entry in inputs:
        make, call = entry.constructor_input, entry.forward_input
        options = {k: with_dtype(v, dtype) for k, v in make.kwargs.items()}
        args = tuple(with_dtype(a, dtype) for a in call.args)
        text = f"{case.module.__name__} {entry.desc} {[tuple(a.shape) for a in args]}"
        mine, stock = (cls(*make.args, **options) for cls in (case.module, case.torch_module))
        calls.append((text, (mine, args, call.kwargs), (stock, args, call.kwargs)))
    return calls


def differentiate(call: Call, dtype: torch.dtype) -> list[Tensor | None]:
    """Loss, and gradients of the floating arguments from an incoming gradient of small integers."""
    function, args, kwargs = call
    if isinstance(function, torch.nn.Module):
        function = copy.deepcopy(function).to(dtype)
    kwargs = {k: with_dtype(v, dtype) for k, v in kwargs.items()}
    leaves = [with_dtype(a, dtype) for a in args]
    leaves = [a.requires_grad_(a.is_floating_point()) for a in leaves]
    loss = function(*leaves, **kwargs)
    incoming = torch.arange(loss.numel()).reshape(loss.shape) % 5 - 1
    loss.backward(incoming.to(loss.dtype) + (loss.dim() == 0) * 2)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@every_dtype
@every_stock_case
def test_samples(case: Case, dtype: torch.dtype) -> None:
    calls = samples(case, dtype)
    assert len(calls) >= {"cross_entropy": 100, "mse_loss": 10}[case.name]
    for text, mine, stock in calls:
        got, theirs = (differentiate(call, dtype) for call in (mine, stock))
        want = differentiate(stock, torch.float64)
        magnitude = max((a.abs().max().item() for a in mine[1] if a.is_floating_point()), default=0)
        for i, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
            assert (g is None) == (t is None), f"{text}: gradient {i} is {g}"
            if g is not None and w is not None:
                label = f"{text} {dtype}: {'loss' if i == 0 else f'gradient {i}'}"
                magnitude = magnitude if dtype is torch.float64 else 0.0
                check(g, w, t, label, magnitude)


@every_stock_case
def test_gradcheck(case: Case) -> None:
    """Numerical derivatives, for each sample and its every differentiable argument."""
    for text, (function, args, kwargs), _ in samples(case, torch.float64):
        leaves = [with_dtype(a, torch.float64) for a in args]
        leaves = [a.requires_grad_(a.is_floating_point()) for a in leaves]
        small = args[0].numel() <= 50
        assert torch.autograd.gradcheck(
            lambda *a, f=function, k=kwargs: f(*a, **k), leaves, fast_mode=not small
        ), text


@every_dtype
@every_stock_case
def test_error_inputs(case: Case, dtype: torch.dtype) -> None:
    """What torch's module refuses, ours refuses, in its own words."""
    info = MODULES[case.torch_module]
    if info.module_error_inputs_func is None:
        assert case.name == "mse_loss"
        return
    errors = list(info.module_error_inputs_func(info, "cpu", torch.float32, False, training=True))
    assert len(errors) >= 7
    for error in errors:
        make, call = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        options = {k: with_dtype(v, dtype) for k, v in make.kwargs.items()}
        args = [with_dtype(a, dtype) for a in call.args]
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"^mbkern: "):
            case.module(*make.args, **options)(*args, **call.kwargs)


def _positional(function: Any) -> list[tuple[str, Any]]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind in kinds]


@every_stock_case
def test_signatures(case: Case) -> None:
    """torch's arguments in torch's order with torch's defaults; ours are keywords with defaults."""
    pairs = [
        (case.function, case.torch),
        (case.module.__init__, case.torch_module.__init__),
        (case.module.forward, case.torch_module.forward),
    ]
    for mine, stock in pairs:
        assert _positional(mine) == _positional(stock)
        for p in inspect.signature(mine).parameters.values():
            assert p.kind is not p.VAR_KEYWORD, f"{mine} swallows misspelt options"
            assert p.kind is not p.KEYWORD_ONLY or p.default is not p.empty


MODULE_OPTIONS: dict[str, dict[str, Any]] = {
    "cross_entropy": {
        "weight": torch.tensor([1.0, 2.0, 0.5]),
        "ignore_index": 1,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
    },
}
EXTRAS = {"reduction": "sum", "grad_scale": 2.0, "loss_dtype": torch.float64, "inplace": False}


def module_and_call(case: Case) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    module = case.module(**MODULE_OPTIONS.get(case.name, {}), **EXTRAS)
    sample = case.sample((4, 3), torch.float32)
    return module, (sample.input, sample.target)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_modules_are_the_functions(case: Case) -> None:
    """Every option of a constructor reaches the function; the sample weight comes with the call."""
    module, arguments = module_and_call(case)
    options = {**MODULE_OPTIONS.get(case.name, {}), **EXTRAS}
    assert torch.equal(module(*arguments), case.function(*arguments, **options))
    for name in options:
        changed = {k: v for k, v in options.items() if k != name}
        result = case.module(**changed)(*arguments)
        assert torch.equal(result, case.function(*arguments, **changed)), name
    weight = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    weight = weight.flatten() if case.has_rows else weight
    weighted = module(*arguments, sample_weight=weight)
    assert torch.equal(weighted, case.function(*arguments, **options, sample_weight=weight))
    assert not torch.equal(weighted, module(*arguments))
    mean = case.module(denominator=64)
    assert torch.equal(mean(*arguments), case.function(*arguments, denominator=64))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_modules_travel(case: Case) -> None:
    """Pickle, torch.save, deepcopy and state_dict keep every option."""
    module, arguments = module_and_call(case)
    want = module(*arguments)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(module)
        plain = [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in (module, other)]
        assert plain[0] == plain[1]
        assert torch.equal(other(*arguments), want)
    if case.torch_module is not None:
        torchs = {k: v for k, v in MODULE_OPTIONS.get(case.name, {}).items() if k == "weight"}
        stock = case.torch_module(**torchs)
        assert list(module.state_dict()) == list(stock.state_dict())
        fresh = case.module(**{k: torch.ones_like(v) for k, v in torchs.items()})
        fresh.load_state_dict(stock.state_dict())
        assert torch.equal(fresh(*arguments), case.module(**torchs)(*arguments))


@every_stock_case
def test_repr(case: Case) -> None:
    assert repr(case.module()) == repr(case.torch_module())


def test_legacy_arguments() -> None:
    """size_average and reduce mean what they mean in torch, and warn as there."""
    for case in STOCK:
        sample = case.sample((4, 3), torch.float32)
        arguments = (sample.input, sample.target)
        for average, reduce in ((True, True), (False, True), (None, False), (False, None)):
            options = {"size_average": average, "reduce": reduce}
            with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
                got = case.function(*arguments, **options)
            with pytest.warns(UserWarning, match="will be deprecated"):
                module = case.module(**options)
            with pytest.warns(UserWarning, match="will be deprecated"):
                want = case.torch(*arguments, **options)
            torch.testing.assert_close(got, want)
            assert torch.equal(module(*arguments), got)


def test_reduction_names() -> None:
    for case in CASES:
        sample = case.sample((4, 3), torch.float32)
        for reduction in ("average", "", "Mean", "batchmean"):
            with pytest.raises(ValueError, match="is not a valid reduction"):
                case.function(sample.input, sample.target, reduction=reduction)
        for reduction in ("none", "sum"):
            with pytest.raises(ValueError, match="denominator goes with reduction='mean'"):
                case.function(sample.input, sample.target, reduction=reduction, denominator=2)


def test_weights_that_require_grad_are_refused() -> None:
    """Silently losing a gradient would be wrong."""
    for case in CASES:
        sample = case.sample((4, 3), torch.float32)
        shape = (4,) if case.has_rows else (4, 3)
        names = inspect.signature(case.function).parameters
        shapes = {"weight": (3,) if case.has_rows else (4, 3), "sample_weight": shape}
        for name in shapes.keys() & names:
            weight = torch.ones(shapes[name], requires_grad=True)
            with pytest.raises(NotImplementedError, match="no gradient is computed for weights"):
                case.function(sample.input, sample.target, **{name: weight})
            with torch.no_grad():
                case.function(sample.input, sample.target, **{name: weight})
