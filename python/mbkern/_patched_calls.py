"""Which calls of torch's losses mbkern computes exactly; the rest is torch's. See ``_patched``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from mbkern import _patched_head, functional
from mbkern._arguments import REDUCTIONS
from mbkern._losses import Loss, find, losses
from mbkern._tensors import DTYPES, has_kernels

_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_functorch_active = torch._C._are_functorch_transforms_active
_HEAD = "linear_cross_entropy"
#: Torch composes them of operations that autocast does not put into float32 everywhere.
_LEFT_IN_HALF = ("gaussian_nll_loss", "multilabel_soft_margin_loss")


@dataclass(frozen=True, eq=False)
class Entry:
    """One loss that both libraries have.

    Attributes:
        name: of both functions.
        loss: our loss.
        is_row: whether its target is a class an item, among the columns of the input.
        names: torch's parameters in order, first the tensors.
        tensors: how many of them are tensors that the loss is of: two or three.
        defaults: of torch's options.
        signature: of torch's function.
        original: torch's function.
        function: ours.
    """

    name: str
    loss: Loss
    is_row: bool
    names: tuple[str, ...]
    tensors: int
    defaults: dict[str, Any]
    signature: inspect.Signature
    original: Callable[..., Tensor]
    function: Callable[..., Tensor]


def _entry(loss: Loss) -> Entry | None:
    name, is_row = loss.name, loss.target == "index"
    original, function = _torchs_own(name), getattr(functional, name, None)
    if original is None or function is None:
        return None
    signature = inspect.signature(original)
    parameters = signature.parameters
    names = tuple(parameters)
    required = [p for p in parameters.values() if p.default is p.empty]
    defaults = {key: parameters[key].default for key in names[len(required) :]}
    return Entry(name, loss, is_row, names, len(required), defaults, signature, original, function)


def _torchs_own(name: str) -> Callable[..., Tensor] | None:
    """torch's function of a name; None if there is none, or somebody else's in its place."""
    function: Callable[..., Tensor] | None = getattr(torch_functional, name, None)
    own = getattr(function, "__globals__", None) is vars(torch_functional)
    return function if own else None


def entries(besides: Container[str] = ()) -> list[Entry]:
    """Every loss that both libraries have, where torch's function is torch's; but some names."""
    found = [_entry(loss) for loss in losses() if loss.name not in besides]
    if _HEAD not in besides:
        found.append(_head())
    return [entry for entry in found if entry is not None]


def _head() -> Entry | None:
    """The fused head, which torch has had since 2.13."""
    original, function = _torchs_own(_HEAD), functional.linear_cross_entropy
    if original is None:
        return None
    loss, signature = find("cross_entropy"), inspect.signature(original)
    return Entry(
        _HEAD, loss, True, tuple(signature.parameters), 3, {}, signature, original, function
    )


# ---- what is supported exactly -------------------------------------------------------------------

# A fake tensor stands for a plain one. A functional tensor (a graph that the compiler lowers) does
# not: the compiler's caches know the wrapper and torch's function by the same name.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
_STRIDED = torch.strided
_INDEX = torch.int64
_HALF = (torch.bfloat16, torch.float16)
_DEPRECATED = ("size_average", "reduce")
_NUMBERS = (float, int)
_MISSING = object()


def refusal(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Say why torch computes this call; None if mbkern computes exactly it.

    Whatever torch would refuse is refused here, so that the error is torch's.
    """
    if entry.name == _HEAD:
        if _tracing_state() is not None or _is_compiling() or _functorch_active():
            return "a tracer or transform"  # there the logits would be whole here, too
        return _patched_head.refusal(entry.original, args, kwargs, _tensor_refusal)
    third = None
    if len(args) == entry.tensors == 2:
        input, target = args
        options = kwargs
    else:
        bound = _bind(entry, args, kwargs)
        if bound is None:
            return "arguments of no loss"
        (input, target, *rest), options = bound
        if rest:
            third = rest[0]
            reason = _third_refusal(entry, input, third)
            if reason is not None:
                return reason
    reason = _tensor_refusal(input, "input") or _tensor_refusal(target, "target")
    if reason is not None:
        return reason
    if not _on_one_device(input, target):
        return f"target is on {target.device}, input on {input.device}"
    if _tracing_state() is not None:
        return "torch.jit.trace"
    if _is_compiling() and _is_transformed():
        return "a transform inside torch.compile"  # which loses the derivatives of our operators
    if input.dtype not in DTYPES:
        return f"input is {_short(input.dtype)}"
    if entry.name in _LEFT_IN_HALF and input.dtype in _HALF and _is_autocast(input.device):
        return "autocast, which leaves this loss in 16 bits on some devices"
    if entry.name == "binary_cross_entropy" and not input.is_cpu and _is_autocast(input.device):
        return "autocast, under which torch refuses this loss on CUDA"
    if entry.loss.kind == "multirow":
        reason = _rows_refusal(entry, input, target, options)
        if reason is not None:
            return reason
    items = _row_refusal if entry.is_row else _pointwise_refusal
    if entry.loss.target == "list":
        items = _list_refusal
    return items(input, target, options) or (
        _options_refusal(entry, input, options) if options else None
    )


def _bind(
    entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]] | None:
    """The loss's tensors and its options, however they were passed; None if that is no call."""
    names = entry.names
    given = dict(zip(names, args, strict=False))
    count = len(given) + len(kwargs)
    given.update(kwargs)
    if len(args) > len(names) or len(given) < count:
        return None
    first = names[: entry.tensors]
    if any(name not in given for name in first):
        return None
    return [given.pop(name) for name in first], given


def as_handed_on(
    entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]] | None:
    """Arguments as torch's function hands them to overrides: its tensors, then every option by
    name, given or not; None if that is no call.
    """
    try:
        bound = entry.signature.bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    options = dict(bound.arguments)
    return [options.pop(name) for name in entry.names[: entry.tensors]], options


def _third_refusal(entry: Entry, input: Any, third: Any) -> str | None:
    """A third tensor of the input's shape and dtype; a variance may be a number."""
    name = entry.names[2]
    if type(third) in _NUMBERS and entry.name == "gaussian_nll_loss":
        return None
    reason = _tensor_refusal(input, entry.names[0]) or _tensor_refusal(third, name)
    if reason is not None:
        return reason
    wanted = input.shape[:-1] if entry.loss.target == "label" else input.shape
    if third.shape != wanted:
        return f"{name} differs in shape"
    whole = entry.loss.target == "label" and third.dtype is _INDEX
    if third.dtype is not input.dtype and not whole:
        return f"{name} is {_short(third.dtype)}, input {_short(input.dtype)}"
    return None if _on_one_device(input, third) else f"{name} is on {third.device}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor_refusal(tensor: Any, name: str) -> str | None:
    if type(tensor) not in _PLAIN:
        return f"{name} is a {type(tensor).__name__}"
    if not has_kernels(tensor):
        return f"{name} is on {tensor.device.type}"
    if tensor.layout is not _STRIDED or tensor.is_nested:
        return f"{name} is not strided"
    return None


def _on_one_device(input: Tensor, other: Tensor) -> bool:
    return (input.is_cpu and other.is_cpu) or other.device == input.device


def _is_transformed() -> bool:
    return _functorch_active() or forward_ad._current_level >= 0


def _is_autocast(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _dtypes_agree(input: Tensor, other: Tensor) -> bool:
    """Whether both have one dtype, or autocast converts both to float32."""
    if other.dtype is input.dtype:
        return True
    double = torch.float64 in (input.dtype, other.dtype)
    return other.dtype in DTYPES and not double and _is_autocast(input.device)


def _row_refusal(input: Tensor, target: Tensor, options: dict[str, Any]) -> str | None:
    shape, wanted = input.shape, target.shape
    index = target.dtype is _INDEX
    if index and len(shape) == 2 and len(wanted) == 1 and wanted[0] == shape[0] and shape[1]:
        return None
    if len(shape) == 0:
        return "input has no class dimension"
    if shape[1 if len(shape) > 1 else 0] == 0:
        return "no classes"
    if wanted == shape and target.is_floating_point():
        if not _dtypes_agree(input, target):
            return f"target is {_short(target.dtype)}, input {_short(input.dtype)}"
        ignored = options.get("ignore_index", -100)
        return "ignore_index with class probabilities" if ignored != -100 else None
    if not index:
        return f"target is {_short(target.dtype)}"
    if wanted != (shape[:1] + shape[2:] if len(shape) > 1 else ()):
        return "target's shape"
    return None


def _list_refusal(input: Tensor, target: Tensor, options: dict[str, Any]) -> str | None:
    return None if input.shape == target.shape else "input and target differ in shape"


def _rows_refusal(
    entry: Entry, input: Tensor, target: Tensor, options: dict[str, Any]
) -> str | None:
    """What torch has and losses of rows here have not, or otherwise."""
    name, shape = entry.name, input.shape
    if name != "nll_loss" and len(shape) > 2:
        return "more than two dimensions"
    if len(shape) == 0 or 0 in shape:
        return "an empty input"
    if name == "multilabel_margin_loss":
        return None if target.dtype is _INDEX else f"target is {_short(target.dtype)}"
    if entry.is_row:
        return "class probabilities" if target.is_floating_point() else None
    return "p" if options.get("p", 2) != 2 else None


def _pointwise_refusal(input: Tensor, target: Tensor, options: dict[str, Any]) -> str | None:
    if input.shape != target.shape:
        return "input and target differ in shape"  # torch warns, or raises
    if not _dtypes_agree(input, target):
        return f"target is {_short(target.dtype)}, input {_short(input.dtype)}"
    return None


def _options_refusal(entry: Entry, input: Tensor, options: dict[str, Any]) -> str | None:
    defaults = entry.defaults
    for name, value in options.items():
        default = defaults.get(name, _MISSING)
        if default is _MISSING:
            return f"no option {name}"
        if value is default or (type(value) is type(default) and value == default):
            continue
        if name == "reduction" and entry.name == "kl_div" and value == "batchmean":
            continue
        check = _OPTIONS.get(name)
        if check is not None:
            fits = check(value)
        elif isinstance(value, Tensor):
            reason = _weight_refusal(entry, input, name, value)
            if reason is not None:
                return reason
            fits = True
        else:
            numbers = type(value) in _NUMBERS and type(default) in _NUMBERS
            fits = numbers or type(value) is type(default)
        if not fits:
            return name
    return None


def _is_index(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_share(value: Any) -> bool:
    return type(value) in _NUMBERS and 0 <= value <= 1


def _is_reduction(value: Any) -> bool:
    return type(value) is str and value in REDUCTIONS


def _is_none(value: Any) -> bool:
    return value is None


_BROADCASTS = ("binary_cross_entropy", "binary_cross_entropy_with_logits")  # their weights


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a shape broadcasts to another one."""
    return len(shape) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(wanted), strict=False)
    )


#: What options of one meaning in all losses may be; a number of another name is of its default's
#: type, and where mbkern refuses its value, torch is asked.
_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "reduction": _is_reduction,
    "ignore_index": _is_index,
    "label_smoothing": _is_share,
    **dict.fromkeys(_DEPRECATED, _is_none),
}


def _weight_refusal(entry: Entry, input: Tensor, name: str, weight: Tensor) -> str | None:
    """Weights of classes or elements, of the input's dtype, that no derivative is asked of."""
    reason = _tensor_refusal(weight, name)
    if reason is not None:
        return reason
    if not _on_one_device(input, weight):
        return f"{name} is on {weight.device}, input on {input.device}"
    if weight.requires_grad:
        return f"{name} requires grad"
    if _is_transformed():  # a tensor that is differentiated outside a vmap does not say so inside
        return f"{name} under a transform"
    shape = input.shape
    classes = shape[1 if len(shape) > 1 else 0 : 2]
    by_class = entry.loss.weight == "classes"
    if by_class:
        fits = weight.shape == classes
    else:
        fits = weight.shape == shape or (entry.name in _BROADCASTS and _fits(weight.shape, shape))
    if not fits:
        return f"{name}'s shape"
    if weight.dtype is not input.dtype and not (by_class and _dtypes_agree(input, weight)):
        return f"{name} is {_short(weight.dtype)}, input {_short(input.dtype)}"
    if not by_class and input.dtype in _HALF and _is_autocast(input.device):
        return f"{name} under autocast"  # torch forms the product without autocast's float32
    return None
