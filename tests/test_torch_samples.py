"""torch's own test samples (OpInfo, ModuleInfo) give torch's results; the modules are drop-in."""

from __future__ import annotations

import copy
import functools
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

import mbkern
import mbkern.functional as M

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:reduction. .mean. divides"),  # of kl_div
]

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
    info = MODULES.get(case.torch_module)
    if info is None:  # torch has no samples of it
        return calls
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


def require_grad(case: Case, args: list[Any]) -> list[Any]:
    """Of the arguments that are differentiable here; class indices are not, in cross_entropy."""
    names = case.arguments if case.has_rows else case.differentiable
    for name, value in zip(case.arguments, args, strict=False):
        if name in names and isinstance(value, Tensor):
            value.requires_grad_(value.is_floating_point())
    return args


def differentiate(case: Case, call: Call, dtype: torch.dtype) -> list[Tensor | None]:
    """Loss, and gradients of the arguments from an incoming gradient of small integers."""
    function, args, kwargs = call
    if isinstance(function, torch.nn.Module):
        function = copy.deepcopy(function).to(dtype)
    kwargs = {k: with_dtype(v, dtype) for k, v in kwargs.items()}
    leaves = require_grad(case, [with_dtype(a, dtype) for a in args])
    loss = function(*leaves, **kwargs)
    incoming = torch.arange(loss.numel()).reshape(loss.shape) % 5 - 1
    loss.backward(incoming.to(loss.dtype) + (loss.dim() == 0) * 2)
    return [loss.detach(), *(a.grad if isinstance(a, Tensor) else None for a in leaves)]


def largest(case: Case, args: tuple[Any, ...]) -> float:
    """Of the numbers that a loss adds and subtracts."""
    tops = [a.detach().nan_to_num(0, 0, 0).abs().max().item() for a in args if is_numbers(a)]
    if case.name == "gaussian_nll_loss" and len(tops) > 2:  # squares over squared variances
        return float(((tops[0] + tops[1]) / args[2].min() + 1) ** 2)
    return max(tops, default=0.0)


def is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


@every_dtype
@every_stock_case
def test_samples(case: Case, dtype: torch.dtype) -> None:
    calls = samples(case, dtype)
    assert len(calls) >= {"cross_entropy": 100}.get(case.name, 7)
    for text, mine, stock in calls:
        got, theirs = (differentiate(case, call, dtype) for call in (mine, stock))
        want = differentiate(case, stock, torch.float64)
        magnitude = largest(case, mine[1])
        for i, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
            assert (g is None) == (t is None), f"{text}: gradient {i} is {g}"
            if g is not None and w is not None:
                label = f"{text} {dtype}: {'loss' if i == 0 else f'gradient {i}'}"
                counts = dtype is torch.float64 or case.size is not None
                if i > 0 and g.shape != mine[1][0].shape and dtype.itemsize == 2:
                    continue  # summed by torch, after the rounding
                if case.name in ("poisson_nll_loss", "kl_div") and i == 2:
                    # NaN times 0, or 0 * inf: see the lattice of test_special_values.py
                    odd = w.isnan() | g.isnan()
                    g, w, t = (v.masked_fill(odd, 0) for v in (g, w, t))
                check(g, w, t, label, magnitude if counts else 0.0)


@every_stock_case
def test_gradcheck(case: Case) -> None:
    """Numerical derivatives, for each sample and its every differentiable argument."""
    for text, (function, args, kwargs), (stock, _, _) in samples(case, torch.float64):
        leaves = require_grad(case, [with_dtype(a, torch.float64) for a in args])
        if case.name == "binary_cross_entropy":  # a step away from 0 or 1 is no probability
            leaves = [t.detach().mul(0.9).add(0.05).requires_grad_() for t in leaves]
        small = args[0].numel() <= 50
        options = {"fast_mode": not small, "raise_exception": False}
        passes = (
            torch.autograd.gradcheck(functools.partial(f, **kwargs), leaves, **options)
            for f in (function, stock)
        )  # torch's own may be at a kink, or not be a number
        assert next(passes) or not next(passes), text


@every_dtype
@every_stock_case
def test_error_inputs(case: Case, dtype: torch.dtype) -> None:
    """What torch's module refuses, ours refuses, in its own words."""
    info = MODULES.get(case.torch_module)
    if info is None or info.module_error_inputs_func is None:
        assert case.name != "cross_entropy"
        return
    errors = list(info.module_error_inputs_func(info, "cpu", torch.float32, False, training=True))
    assert len(errors) >= (7 if case.name == "cross_entropy" else 1)
    for error in errors:
        make, call = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        options = {k: with_dtype(v, dtype) for k, v in make.kwargs.items()}
        if call is None:  # the constructor, which is torch's, refuses it
            with pytest.raises(error.error_type, match=error.error_regex):
                case.module(*make.args, **options)
            continue
        args = [with_dtype(a, dtype) for a in call.args]
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"^mbkern: "):
            case.module(*make.args, **options)(*args, **call.kwargs)


ERRORS = [op for op in OPS.values() if op.error_inputs_func and hasattr(M, op.name.split(".")[-1])]


@pytest.mark.parametrize("op", ERRORS, ids=lambda op: op.name.split(".")[-1])
def test_error_inputs_of_functions(op: Any) -> None:
    """What torch's function refuses, ours of that name refuses."""
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)) as caught:
            getattr(M, op.name.split(".")[-1])(sample.input, *sample.args, **sample.kwargs)
        same = isinstance(caught.value, error.error_type)  # in our words, or in torch's own
        assert str(caught.value).startswith("mbkern: ") or same, error.error_regex


def test_all_error_inputs_are_seen() -> None:
    names = {op.name.split(".")[-1] for op in ERRORS}
    assert names >= {
        "soft_margin_loss", "margin_ranking_loss", "multi_margin_loss", "multilabel_margin_loss",
        "triplet_margin_loss", "triplet_margin_with_distance_loss", "l1_loss", "gaussian_nll_loss",
        "hinge_embedding_loss", "huber_loss", "poisson_nll_loss", "linear_cross_entropy",
    } or torch.__version__ < "2.13"  # fmt: skip


def _positional(function: Any) -> list[tuple[str, Any]]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind in kinds]


@every_stock_case
def test_signatures(case: Case) -> None:
    """torch's arguments in torch's order with torch's defaults; ours are keywords with defaults."""
    for mine, stock in (
        (case.function, case.torch),
        (case.module.forward, case.torch_module.forward),
    ):
        assert _positional(mine) == _positional(stock)
        for p in inspect.signature(mine).parameters.values():
            assert p.kind is not p.KEYWORD_ONLY or p.default is not p.empty
    defaults = [default for name, default in _positional(case.torch_module.__init__)[1:]]
    for module in (case.module(*defaults), case.module()):
        for name, value in vars(case.torch_module()).items():
            assert name[0] == "_" or vars(module)[name] == value
    sample = case.sample((4, 3), torch.float32)
    with pytest.raises(TypeError, match="misspelt"):
        case.function(sample.input, sample.target, misspelt=1)
    with pytest.raises(TypeError, match="misspelt"):
        case.module(misspelt=1)


MODULE_OPTIONS: dict[str, dict[str, Any]] = {
    "cross_entropy": {
        "weight": torch.tensor([1.0, 2.0, 0.5]),
        "ignore_index": 1,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
    },
    "smooth_l1_loss": {"beta": 0.5},
    "huber_loss": {"delta": 0.5},
    "quantile_loss": {"quantile": 0.9},
    "binary_cross_entropy": {"weight": torch.tensor([1.0, 2.0, 0.5])},
    "binary_cross_entropy_with_logits": {
        "weight": torch.tensor([1.0, 2.0, 0.5]),
        "pos_weight": torch.tensor([2.0, 1.0, 0.5]),
    },
    "sigmoid_focal_loss": {"alpha": 0.5, "gamma": 1.5},
    "hinge_embedding_loss": {"margin": 0.5},
    "hinge_loss": {"margin": 0.5},
    "squared_hinge_loss": {"margin": 0.5},
    "margin_ranking_loss": {"margin": 0.5},
    "kl_div": {"log_target": True},
    "poisson_nll_loss": {"log_input": True, "full": True, "eps": 1e-3},
    "gaussian_nll_loss": {"full": True, "eps": 0.75},
    "tweedie_nll_loss": {"power": 1.25, "log_input": False, "eps": 1e-3},
}
EXTRAS = {"reduction": "sum", "grad_scale": 2.0, "loss_dtype": torch.float64, "inplace": False}


def module_and_call(case: Case) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    module = case.module(**MODULE_OPTIONS.get(case.name, {}), **EXTRAS)
    sample = case.sample((4, 3), torch.float32)
    return module, tuple(case.tensors(sample).values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_modules_are_the_functions(case: Case) -> None:
    """Every option of a constructor reaches the function; the sample weight comes with the call."""
    module, arguments = module_and_call(case)
    options = {**MODULE_OPTIONS.get(case.name, {}), **EXTRAS}
    function = getattr(mbkern.functional, case.name)
    assert torch.equal(module(*arguments), function(*arguments, **options))
    for name in options:
        changed = {k: v for k, v in options.items() if k != name}
        result = case.module(**changed)(*arguments)
        assert torch.equal(result, function(*arguments, **changed)), name
    weight = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    weight = weight.flatten() if case.has_rows else weight
    weighted = module(*arguments, sample_weight=weight)
    assert torch.equal(weighted, case.function(*arguments, **options, sample_weight=weight))
    assert not torch.equal(weighted, module(*arguments))
    mean = case.module(denominator=64, reduction="mean")
    assert torch.equal(mean(*arguments), case.function(*arguments, denominator=64))


def stock_names(case: Case) -> set[str]:
    """Tensors that torch's module keeps in its state, too."""
    return {"weight", "pos_weight"} & set(inspect.signature(case.torch_module.__init__).parameters)


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
        torchs = {
            k: v for k, v in MODULE_OPTIONS.get(case.name, {}).items() if k in stock_names(case)
        }
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
        if "size_average" not in inspect.signature(case.torch).parameters:
            continue
        arguments = tuple(case.tensors(sample).values())
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
            if (reduction, case.name) == ("batchmean", "kl_div"):
                continue
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
        names = {"sample_weight", *inspect.signature(case.function).parameters}
        shapes = {"weight": (3,) if case.has_rows else (4, 3), "sample_weight": shape}
        for name in shapes.keys() & names:
            weight = torch.ones(shapes[name], requires_grad=True)
            with pytest.raises(NotImplementedError, match="no gradient is computed for weights"):
                case.function(sample.input, sample.target, **{name: weight})
            with torch.no_grad():
                case.function(sample.input, sample.target, **{name: weight})
