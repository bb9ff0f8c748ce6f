"""torch's own loss functions, run by mbkern where a call means exactly the same there.

Every loss of ``mbkern.losses()`` whose name ``torch.nn.functional`` knows comes in by itself. Two
ways to catch a call:

- wrappers in ``torch.nn.functional``, there while any thread is inside, that ask a switch of the
  thread; no other call costs anything;
- ``mode=True``: a torch function mode, which sees every torch call of the thread, hence also
  functions whose names were imported beforehand.

One predicate, :func:`refusal`, says whether mbkern computes a call. All else is torch's: results,
errors, and the words of the errors.

Limits. The switch is a thread's, not a task's: coroutines of one thread share it, as they share
torch's modes. Under torch.compile the switch is guarded, so that code is traced again where it
differs; but enter outside the compiled function: inside, there is a graph break. A
``torch.nn.CrossEntropyLoss`` that is *made* inside a compiled function stays torch's, and so do
torch.func transforms there. Compiled calls are not counted in reports. A wrapper that was taken out
of ``torch.nn.functional`` and kept runs torch outside, and can be pickled inside only; torch's own
function, outside only. Warnings of torch's functions name this file as the caller.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from mbkern import functional
from mbkern._arguments import REDUCTIONS
from mbkern._losses import losses
from mbkern._tensors import DTYPES, has_kernels

__all__ = ["PatchReport", "patch", "patched", "unpatch"]

_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_functorch_active = torch._C._are_functorch_transforms_active


@dataclass(frozen=True, eq=False)
class _Entry:
    """One loss that both libraries have.

    Attributes:
        name: of both functions.
        is_row: whether an item is a row of classes.
        names: torch's parameters in order; the first two are the input and the target.
        defaults: of torch's options.
        original: torch's function.
        function: ours.
    """

    name: str
    is_row: bool
    names: tuple[str, ...]
    defaults: dict[str, Any]
    original: Callable[..., Tensor]
    function: Callable[..., Tensor]


def _entry(name: str, is_row: bool) -> _Entry | None:
    original = getattr(torch_functional, name, None)
    function = getattr(functional, name, None)
    if original is None or function is None:
        return None
    parameters = inspect.signature(original).parameters
    names = tuple(parameters)
    defaults = {key: parameters[key].default for key in names[2:]}
    return _Entry(name, is_row, names, defaults, original, function)


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


def refusal(entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Say why torch computes this call; None if mbkern computes exactly it.

    Whatever torch would refuse is refused here, so that the error is torch's.
    """
    if len(args) == 2:
        input, target = args
        options = kwargs
    else:
        bound = _bind(entry, args, kwargs)
        if bound is None:
            return "arguments of no loss"
        input, target, options = bound
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
    items = _row_refusal if entry.is_row else _pointwise_refusal
    return items(input, target, options) or (
        _options_refusal(entry, input, options) if options else None
    )


def _bind(
    entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]] | None:
    """Input, target and options, however they were passed; None if that is no call."""
    names = entry.names
    given = dict(zip(names, args, strict=False))
    count = len(given) + len(kwargs)
    given.update(kwargs)
    if len(args) > len(names) or len(given) < count:
        return None
    if names[0] not in given or names[1] not in given:
        return None
    return given.pop(names[0]), given.pop(names[1]), given


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


def _pointwise_refusal(input: Tensor, target: Tensor, options: dict[str, Any]) -> str | None:
    if input.shape != target.shape:
        return "input and target differ in shape"  # torch warns, or raises
    if not _dtypes_agree(input, target):
        return f"target is {_short(target.dtype)}, input {_short(input.dtype)}"
    return None


def _options_refusal(entry: _Entry, input: Tensor, options: dict[str, Any]) -> str | None:
    defaults = entry.defaults
    for name, value in options.items():
        default = defaults.get(name, _MISSING)
        if default is _MISSING:
            return f"no option {name}"
        if value is default or (type(value) is type(default) and value == default):
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
            fits = type(value) is type(default)
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


#: What options of one meaning in all losses may be; a number of another name is of its default's
#: type, and where mbkern refuses its value, torch is asked.
_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "reduction": _is_reduction,
    "ignore_index": _is_index,
    "label_smoothing": _is_share,
    **dict.fromkeys(_DEPRECATED, _is_none),
}


def _weight_refusal(entry: _Entry, input: Tensor, name: str, weight: Tensor) -> str | None:
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
    if weight.shape != (classes if entry.is_row else shape):
        return f"{name}'s shape"
    if weight.dtype is not input.dtype and not (entry.is_row and _dtypes_agree(input, weight)):
        return f"{name} is {_short(weight.dtype)}, input {_short(input.dtype)}"
    if not entry.is_row and input.dtype in _HALF and _is_autocast(input.device):
        return f"{name} under autocast"  # torch forms the product without autocast's float32
    return None


# ---- counts --------------------------------------------------------------------------------------


class PatchReport:
    """What became of the calls inside ``patched(report=True)``; compiled calls are not counted.

    Attributes:
        taken: number of calls that mbkern computed, by name of the loss.
        passed_on: number of calls that torch computed, by name and reason.
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.passed_on: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def _add(self, name: str, reason: str | None) -> None:
        with self._lock:
            if reason is None:
                self.taken[name] += 1
            else:
                self.passed_on[name, reason] += 1

    def __str__(self) -> str:
        """One line a loss and reason."""
        rows = [("loss", "calls", "computed by")]
        rows += [(name, str(count), "mbkern") for name, count in sorted(self.taken.items())]
        rows += [
            (name, str(count), f"torch: {reason}")
            for (name, reason), count in sorted(self.passed_on.items())
        ]
        first, second = (max(len(row[k]) for row in rows) for k in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:>{second}}  {c}" for a, b, c in rows)


# ---- one call ------------------------------------------------------------------------------------


class _Thread(threading.local):
    """A thread's switch; the class holds what a thread starts with."""

    on = False  # apart from the depth: Dynamo guards what it reads
    depth = 0
    modes: tuple[_Mode, ...] = ()
    reports: tuple[PatchReport, ...] = ()


class _Process:
    """The switch of ``patch``, and how many want the wrappers installed."""

    on = False
    patches = 0
    users = 0


_thread = _Thread()
_lock = threading.RLock()
#: What mbkern raises, before it has written anything, for a call that is no loss.
_REFUSED = (ValueError, TypeError, IndexError, NotImplementedError)


def _count(name: str, reason: str | None) -> None:
    for report in _thread.reports:
        report._add(name, reason)


def _compute(entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run the call here or on torch."""
    counted = not _is_compiling() and bool(_thread.reports)
    reason = refusal(entry, args, kwargs)
    if reason is None:
        try:
            result = entry.function(*args, **kwargs)
        except _REFUSED:
            reason = "refused by mbkern"  # torch's error is raised below, without this as context
        else:
            if counted:
                _count(entry.name, None)
            return result
    if counted:
        _count(entry.name, reason)
    return _call_torch(entry, args, kwargs)


def _call_torch(entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call torch's function; overrides are handed that function, not what is installed for it."""
    if not _is_compiling():
        relevant = (*args, *kwargs.values())
        if has_torch_function(relevant):
            result: Tensor = handle_torch_function(entry.original, relevant, *args, **kwargs)
            return result
    return entry.original(*args, **kwargs)


def _wrap(entry: _Entry) -> Callable[..., Tensor]:
    thread, process, compute, call_torch = _thread, _Process, _compute, _call_torch

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        if (thread.on or process.on) and not thread.modes:
            return compute(entry, args, kwargs)
        return call_torch(entry, args, kwargs)

    # torch.jit.script compiles the source of what is wrapped, with the wrapper's globals.
    rooted = types.FunctionType(
        wrapper.__code__, vars(torch_functional), entry.name, None, wrapper.__closure__
    )
    return functools.wraps(entry.original)(rooted)


class _Mode(TorchFunctionMode):
    """Catches the losses of one thread; inside, this mode is off."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = _entries_by_function()

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        entry = self.entries.get(func)
        if entry is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return _compute(entry, args, kwargs or {})


# ---- on and off ----------------------------------------------------------------------------------


@functools.cache
def _table() -> tuple[tuple[_Entry, Callable[..., Tensor]], ...]:
    """Every loss of both libraries, with its wrapper."""
    # Lists of torch's functions that are made once, and must not be made of wrappers: Dynamo's (at
    # its import, which making an optimizer does, too), and that of what modes can override.
    importlib.import_module("torch._dynamo")
    torch.overrides.get_overridable_functions()
    found = [_entry(loss.name, loss.kind == "row") for loss in losses()]
    return tuple((entry, _wrap(entry)) for entry in found if entry is not None)


def _entries_by_function() -> dict[Any, _Entry]:
    """The entries by torch's functions, and by the wrappers that another thread may install."""
    with _lock:
        functions = {entry.original: entry for entry, _ in _table()}
        return functions | {wrapper: entry for entry, wrapper in _table()}


def _replace(functions: Iterable[tuple[str, Callable[..., Tensor], Callable[..., Tensor]]]) -> None:
    for name, old, new in functions:
        # Somebody else's function, which may call the wrapper, is left where it is.
        if getattr(torch_functional, name) is old:
            setattr(torch_functional, name, new)


def _install() -> None:
    with _lock:
        if _Process.users == 0:
            _replace((entry.name, entry.original, wrapper) for entry, wrapper in _table())
        _Process.users += 1


def _uninstall() -> None:
    with _lock:
        _Process.users -= 1
        if _Process.users == 0:
            _replace((entry.name, wrapper, entry.original) for entry, wrapper in _table())


def patch() -> None:
    """Run torch's losses on mbkern in every thread, until as many calls of :func:`unpatch`."""
    with _lock:
        _install()
        _Process.patches += 1
        _Process.on = True


def unpatch() -> None:
    """Take back one :func:`patch`; RuntimeError if there is none."""
    with _lock:
        if _Process.patches == 0:
            raise RuntimeError("mbkern: unpatch() without a patch() before it")
        _Process.patches -= 1
        _Process.on = _Process.patches > 0
        _uninstall()


class _Patched(contextlib.ContextDecorator):
    def __init__(self, mode: bool, report: bool) -> None:
        self.mode = mode
        self.report = PatchReport() if report else None

    def __enter__(self) -> PatchReport | None:
        if self.mode:
            mode = _Mode()
            mode.__enter__()  # type: ignore[no-untyped-call]
            _thread.modes = (*_thread.modes, mode)
        else:
            _install()
            _thread.depth += 1
            _thread.on = True
        if self.report is not None:
            _thread.reports = (*_thread.reports, self.report)
        return self.report

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if not (_thread.modes if self.mode else _thread.depth):
            raise RuntimeError("mbkern: patched() was left in a thread that had not entered it")
        if self.mode:
            *rest, mode = _thread.modes
            mode.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
            _thread.modes = tuple(rest)
        else:
            _thread.depth -= 1
            _thread.on = _thread.depth > 0
            _uninstall()
        if self.report is not None:
            kept = list(_thread.reports)
            kept.remove(self.report)
            _thread.reports = tuple(kept)


def patched(*, mode: bool = False, report: bool = False) -> _Patched:
    """Run torch's losses on mbkern, in this thread, inside a ``with`` block or decorated function.

    ``torch.nn.functional.cross_entropy`` and ``mse_loss`` (every loss that both libraries have),
    and with them ``torch.nn.CrossEntropyLoss`` and ``MSELoss``, run on mbkern where it computes
    exactly that call, and on torch otherwise, with torch's errors. Blocks may be nested. The first
    one of a process imports ``torch._dynamo``.

    Args:
        mode: catch the calls by a torch function mode, not in ``torch.nn.functional``. Catches also
            functions that were imported by name beforehand; every torch call then costs a little.
        report: the block's value is a :class:`PatchReport` that counts its calls; otherwise None.
    """
    return _Patched(mode, report)
