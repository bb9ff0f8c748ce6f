"""torch's own loss functions, run by mbkern where a call means exactly the same there.

Every loss of ``mbkern.losses()`` whose name ``torch.nn.functional`` knows comes in by itself. Two
ways to catch a call:

- wrappers in ``torch.nn.functional``, there while any thread is inside, that ask a switch of the
  thread; no other call costs anything;
- ``mode=True``: a torch function mode, which sees every torch call of the thread, hence also
  functions whose names were imported beforehand.

One predicate, ``refusal`` of ``_patched_calls``, says whether mbkern computes a call. All else is
torch's: results, errors, and the words of the errors.

Limits. The switch is a thread's, not a task's: coroutines of one thread share it, as they share
torch's modes. Under torch.compile the switch is guarded, so that code is traced again where it
differs; but enter outside the compiled function: inside, there is a graph break. A
``torch.nn.CrossEntropyLoss`` that is *made* inside a compiled function stays torch's, and so do
torch.func transforms there. Compiled calls are not counted in reports. A wrapper that was taken out
of ``torch.nn.functional`` and kept runs torch outside, and can be pickled inside only; torch's own
function, outside only. Warnings of torch's functions name this file as the caller.

Other people's functions. One that has torch's place in ``torch.nn.functional`` stays there, and
that loss is not taken until torch's own is back; a mode then sees it called twice, as all modes do,
if it came before the first block. A function mode of somebody else, and ``__torch_function__`` of a
tensor, are asked first, and handed torch's own function, by which tables made beforehand know it;
``func is torch.nn.functional.mse_loss`` asks for the wrapper inside. What they call then is
torch's. A function that was imported by name hands them the wrapper inside.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from mbkern._patched_calls import Entry, as_handed_on, entries, refusal

__all__ = ["PatchReport", "patch", "patched", "unpatch"]

_is_compiling = torch.compiler.is_compiling
_function_modes = torch._C._len_torch_function_stack
_function_mode = torch._C._get_function_stack_at


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
    """The switch of ``patch``, how many want wrappers installed, and the wrappers by name."""

    on = False
    patches = 0
    users = 0  # modes among them
    modes = 0
    table: ClassVar[dict[str, tuple[Entry, Callable[..., Tensor]]]] = {}


_thread = _Thread()
_lock = threading.RLock()
# A child must not find the lock held by a thread that it does not have, nor torch._dynamo, which
# the first block imports, half imported: a fork waits for the thread that is at it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )
#: What mbkern raises, before it has written anything, for a call that is no loss.
_REFUSED = (ValueError, TypeError, IndexError, NotImplementedError)


def _count(name: str, reason: str | None) -> None:
    for report in set(_thread.reports):  # a block may be entered inside itself
        report._add(name, reason)


def _is_watched() -> bool:
    """Whether a function mode of somebody else is to see torch's function called. torch's own, as
    that of a default device and those of tracers, need not. Compiled code has its own modes.
    """
    if _is_compiling() or not _function_modes():
        return False
    modes = (type(_function_mode(k)) for k in range(_function_modes()))
    return any(m is not _Mode and m.__module__.partition(".")[0] != "torch" for m in modes)


def _compute(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run the call here or on torch."""
    counted = not _is_compiling() and bool(_thread.reports)
    reason = "a function mode" if _is_watched() else refusal(entry, args, kwargs)
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


def _call_torch(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call torch's function; overrides are handed that function, not what is installed for it, and
    the arguments as it hands them on itself.
    """
    if not _is_compiling():
        relevant = (*args, *kwargs.values())
        if has_torch_function(relevant):
            given = as_handed_on(entry, args, kwargs)
            if given is not None:  # else torch's function says what is wrong
                tensors, options = given
                overridden: Tensor = handle_torch_function(
                    entry.original, relevant, *tensors, **options
                )
                return overridden
    return entry.original(*args, **kwargs)


def _wrap(entry: Entry) -> Callable[..., Tensor]:
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
        if entry is None and type(func) not in _BUILT_IN:
            entry = _replaced_by(func)
        if entry is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return _compute(entry, args, kwargs or {})


# ---- on and off ----------------------------------------------------------------------------------


def _table() -> Iterable[tuple[Entry, Callable[..., Tensor]]]:
    """Every loss of both libraries, with its wrapper; under the lock.

    A loss whose function somebody had replaced comes in once torch's own is back.
    """
    table = _Process.table
    if not table:
        # Lists of torch's functions that are made once, and must not be made of wrappers: Dynamo's
        # (at its import, which making an optimizer does, too), and that of what modes can override.
        importlib.import_module("torch._dynamo")
        torch.overrides.get_overridable_functions()
    table.update({entry.name: (entry, _wrap(entry)) for entry in entries(besides=table)})
    return table.values()


def _entries_by_function() -> dict[Any, Entry]:
    """The entries by torch's functions, and by the wrappers that another thread may install."""
    with _lock:
        table = _table()
        functions = {entry.original: entry for entry, _ in table}
        # A wrapper is what torch's own function takes for itself when it asks a mode.
        whole = [(entry, wrapper) for entry, wrapper in table if entry.name not in _INCOMPLETE]
        return functions | {wrapper: entry for entry, wrapper in whole}


def _replaced_by(function: Any) -> Entry | None:
    """The loss whose place in ``torch.nn.functional`` somebody else's function has: what torch's
    own, which that one calls, takes for itself when it asks a mode.
    """
    for entry, wrapper in tuple(_Process.table.values()):
        if getattr(torch_functional, entry.name) is function and function is not wrapper:
            return entry
    return None


#: torch's function does not hand all its arguments (here the weight) to a function mode, and loses
#: them there; the wrapper does.
_INCOMPLETE = ("l1_loss",)
#: The types of nearly all that a mode is handed.
_BUILT_IN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.MethodWrapperType,
    types.WrapperDescriptorType,
)  # fmt: skip


def _is_wanted(entry: Entry) -> bool:
    """Whether there is a user of the wrapper: a mode is one of those that it cannot do without."""
    return _Process.users > (0 if entry.name in _INCOMPLETE else _Process.modes)


def _replace(name: str, old: Callable[..., Tensor], new: Callable[..., Tensor]) -> None:
    # Somebody else's function, which may call the wrapper, is left where it is.
    if getattr(torch_functional, name) is old:
        setattr(torch_functional, name, new)


def _install(*, for_mode: bool = False) -> None:
    """Install the wrappers; also those that somebody else's function was in the way of before."""
    with _lock:
        _Process.users += 1
        _Process.modes += for_mode
        for entry, wrapper in _table():
            if _is_wanted(entry):
                _replace(entry.name, entry.original, wrapper)


def _uninstall(*, for_mode: bool = False) -> None:
    with _lock:
        _Process.users -= 1
        _Process.modes -= for_mode
        for entry, wrapper in _Process.table.values():
            if not _is_wanted(entry):
                _replace(entry.name, wrapper, entry.original)


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

    def __call__(self, function: Any) -> Any:
        """Decorate a function; refuse what would be run after the block was left."""
        kinds = (
            inspect.isclass, inspect.isgeneratorfunction, inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        )  # fmt: skip
        if any(is_kind(function) for is_kind in kinds):
            raise TypeError(
                "mbkern: patched() decorates functions, not generators, coroutines and classes: "
                "these would run outside it; use a with block inside"
            )
        return super().__call__(function)

    def __enter__(self) -> PatchReport | None:
        if self.mode:
            mode = _Mode()
            _install(for_mode=True)
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
        entered = _thread.modes if self.mode else _thread.depth
        if not entered or (self.report is not None and self.report not in _thread.reports):
            raise RuntimeError("mbkern: patched() was left in a thread that had not entered it")
        if self.mode:
            *rest, mode = _thread.modes
            mode.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
            _thread.modes = tuple(rest)
            _uninstall(for_mode=True)
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

    With activation checkpointing, which runs losses again in backward, use :func:`patch`, which is
    for the process, or run backward inside the block in the same thread; otherwise
    ``torch.utils.checkpoint`` raises CheckpointError.

    A process that is forked inside the block is inside, too. One that is spawned, as a DataLoader's
    workers may be, runs torch: call :func:`patch` there (``worker_init_fn``).

    Args:
        mode: catch the calls by a torch function mode, not in ``torch.nn.functional``. Catches also
            functions that were imported by name beforehand; every torch call then costs a little.
            Of ``l1_loss`` only calls as ``torch.nn.functional.l1_loss``: a call by an imported name
            loses its ``weight`` inside any function mode, by an error of torch's.
        report: the block's value is a :class:`PatchReport` that counts its calls; otherwise None.
    """
    return _Patched(mode, report)
