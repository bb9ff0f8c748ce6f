"""Exact mini-batches: gradients summed over micro-batches, normalised once."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mbkern import _accumulator_scaler, _accumulator_state
from mbkern._accumulator_collect import Collector, Measurement
from mbkern._accumulator_counts import Count, check_count, reciprocal
from mbkern._accumulator_flush import FlushOptions, WindowStats, prepare, write
from mbkern._accumulator_hooks import (
    discard,
    put_hooks,
    release,
    require_no_gradients,
    require_none_left,
    unhook,
)
from mbkern._accumulator_parameters import Slot, allocate, penalty, read_parameters
from mbkern._accumulator_ranks import check_group, find_ddp, reduce_window, require_no_sync
from mbkern._accumulator_sharded import find_shards
from mbkern._arguments import Number

_MODES = ("deferred", "streaming", "known")
_LAYOUTS = ("flat", "parameter")
_SPARSE = ("error", "densify")


class GradAccumulator:
    """Sums gradients over micro-batches in fp32, and normalises them once, exactly.

    The gradient of a mini-batch of N items is the sum of its micro-batches' gradients divided by N,
    however it was cut; a mean of the micro-batches' means is not. So each loss is a *sum*, the
    count of its items goes along, and nothing need be known in advance::

        acc = mbkern.GradAccumulator(model)
        for window in batches:
            for x, t in window:
                loss = F.cross_entropy(model(x), t, reduction="sum")
                acc.backward(loss, count=(t != -100).sum())
            acc.flush()
            optimizer.step()

    As autograd produces a parameter's gradient, it is added into that parameter's buffer and freed:
    there is never a second copy of all gradients; small ones wait in buckets of at most 16 MB, for
    one launch. Given the same gradients, the result is the same bits for every thread count,
    instruction set, layout and device. Nobody waits for a device.

    Method: L = sum_i sum_j l_ij / sum_i n_i over micro-batches i and items j, plus the penalty
    sum_p l1 |p| + l2 / 2 p^2, whose gradient is added once.

    FSDP2: give it the wrapped module (one mesh dimension of shards, perhaps one of replicas).
    Either every micro-batch is reduced: a reduce-scatter each, and buffers of a shard's size; or
    ``set_requires_gradient_sync(False)`` for all but the last: FSDP keeps whole gradients in its
    ``reduce_dtype`` meanwhile (choose float32), one reduce-scatter a window. Every rank must run
    every backward. What FSDP divides by is multiplied in again, in fp32. Over ranks go the counts
    and the squares of the norms, one all-reduce each.

    Args:
        parameters: a module, parameters, (name, parameter) pairs, or groups as optimizers have them
            (dicts with ``params``, perhaps ``l1`` and ``l2``). All on one device; float32,
            bfloat16, float16 or float64. A parameter named twice counts once; a frozen one gets no
            gradient until it is unfrozen.
        dtype: of the buffers, float32 or float64; those of float64 parameters are float64.
        layout: "flat" (one allocation) or "parameter" (one for each).
        mode: "deferred": buffers hold sums, ``flush`` divides. "streaming": also, ``.grad`` is
            valid after each micro-batch, as if the window ended there. "known": ``begin(total=n)``
            says N in advance, and each gradient is scaled as it is added.
        denominators: names, if losses have counts of their own. In "known" mode they share one set
            of buffers, else each has its own.
        l1: the penalty of parameters whose group has none of its own.
        l2: the same.
        max_norm: clip the gradient to this norm.
        into: where ``flush`` leaves gradients: "grad" (``.grad`` in the parameter's dtype),
            "fp32_grad" (``.grad`` in the buffer's dtype, through ``Tensor.grad_dtype``, where torch
            has it) or "main_grad" (``.main_grad`` in the buffer's dtype). Where the dtype is that
            of the buffer, the gradient lies in the buffer, until the next micro-batch.
        pre_scale: ``backward`` multiplies losses by it, and it is divided out as gradients are
            added: a power of two that keeps fp16 gradients of sums from overflowing.
        sparse: "error", or "densify": what becomes of sparse gradients.
        measure: keep squared norms of every micro-batch's gradients (8 bytes a parameter).
        process_group: ranks (a group, or ``torch.distributed.group.WORLD``) whose sums and counts
            ``flush`` adds up, by one all-reduce of each buffer memory; every rank must flush. The
            gradient is that of all ranks' items together, in shares of any size. A
            ``DistributedDataParallel`` module given as ``parameters`` brings its own group, and its
            micro-batches must run under its ``no_sync()``. In "known" mode the totals are those of
            all ranks. Parameters without a gradient on any rank get zeros then, and their penalty's
            gradient. An FSDP2 module has its own mesh: see above. Without a group, where there are
            several ranks, a warning says that sums stay this rank's; False says that it is meant.

    Raises:
        TypeError: complex or integer parameters, or not parameters at all.
        ValueError: unknown options, parameters on several devices.
    """

    def __init__(
        self,
        parameters: Any,
        *,
        dtype: torch.dtype = torch.float32,
        layout: str = "flat",
        mode: str = "deferred",
        denominators: Sequence[str] = (),
        l1: float = 0.0,
        l2: float = 0.0,
        max_norm: float | None = None,
        into: str = "grad",
        pre_scale: float = 1.0,
        sparse: str = "error",
        measure: bool = False,
        process_group: Any = None,
    ) -> None:
        for value, name, allowed in (
            (mode, "mode", _MODES),
            (layout, "layout", _LAYOUTS),
            (sparse, "sparse", _SPARSE),
        ):
            if value not in allowed:
                raise ValueError(f"mbkern: {name} must be one of {', '.join(allowed)}: {value!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"mbkern: dtype is {dtype}; buffers are float32 or float64")
        if not (pre_scale > 0 and math.isfinite(pre_scale)):
            raise ValueError(f"mbkern: pre_scale is {pre_scale}; it must be positive and finite")
        if isinstance(denominators, str) or len(set(denominators)) != len(tuple(denominators)):
            raise ValueError(
                f"mbkern: denominators must be a sequence of different names, not {denominators!r}"
            )
        self.mode, self.max_norm, self.measure = mode, max_norm, measure
        self._module = find_ddp(parameters)
        if self._module is not None:
            process_group = self._module.process_group
        self._shards = find_shards(parameters)
        if self._shards is not None and (mode == "streaming" or measure):
            raise NotImplementedError(
                "mbkern: mode='streaming' and measure=True do not go with FSDP modules: the norm "
                "of a shard is not the parameter's"
            )
        if self._shards is not None:
            if process_group not in (None, False):
                raise ValueError("mbkern: an FSDP module has its own mesh; no process_group= then")
            process_group = False
        if process_group not in (None, False) and mode == "streaming":
            raise ValueError(
                "mbkern: mode='streaming' promises a gradient after each micro-batch, which would "
                "be an all-reduce each; use 'deferred' with a process_group"
            )
        self._group = check_group(process_group)
        self._dtype, self._flat, self._into = dtype, layout == "flat", into
        self._pre_scale, self._densify = float(pre_scale), sparse == "densify"
        self._l1, self._l2 = penalty(l1, "l1"), penalty(l2, "l2")
        self._names = tuple(denominators) or ("",)
        self._slots: list[Slot] = []
        self._collector: Collector | None = None
        self._counts: dict[str, Count] = {}
        self._totals: dict[str, Number] | None = None
        self._measurements: list[Measurement] = []
        self._sizes: dict[int, Number] = {}
        self._measured_whole, self._repeated = True, False
        self._lent: dict[str, tuple[Tensor, int]] = {}  # and their versions
        self._omitted: set[str] = set()  # denominators of micro-batches that gave no count
        self._failed: tuple[str, Count] | None = None  # of a micro-batch that was added in part
        self._open = threading.Lock()
        self._micro_batches = 0
        self._broken: str | None = None
        self.add(parameters)

    def add(self, parameters: Any) -> None:
        """Take more parameters, in any of the constructor's forms; known ones are passed over."""
        self._require_closed("add()")
        module = find_ddp(parameters)
        if module is not None and module is not self._module:
            raise ValueError(
                "mbkern: a DistributedDataParallel module is given to the constructor: it brings "
                "its process group"
            )
        new = read_parameters(parameters, self._l1, self._l2, self._slots)
        if self._shards is not None:
            self._shards.check(self._slots + new)
        elif any(slot.mesh is not None for slot in new):
            raise ValueError(
                "mbkern: the parameters are DTensors; give the constructor the module that "
                "fully_shard has wrapped, not its parameters"
            )
        sets = 1 if self.mode == "known" else len(self._names)
        allocate(new, self._dtype, self._flat, sets)
        prepare(new, self._into)
        self._slots += new
        put_hooks(new, weakref.ref(self))

    def close(self) -> None:
        """Take the hooks off the parameters."""
        unhook(self._slots)

    @property
    def max_norm(self) -> float | None:
        """What the gradient is clipped to; may be set between windows."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        if value is not None and not float(value) >= 0:
            raise ValueError(f"mbkern: max_norm is {value}; it must be at least 0, or None")
        self._max_norm = None if value is None else float(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradAccumulator:
        """A copy with buffers of its own, of the parameters' copies; of the same process group."""
        self._require_closed("a deepcopy")
        other = object.__new__(type(self))
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            shared = name in ("_group", "_module", "_shards")
            if name == "_open":
                other.__dict__[name] = threading.Lock()
            else:
                other.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        put_hooks(other._slots, weakref.ref(other))
        return other

    def __reduce__(self) -> Any:
        """Refuse: its parameters are others' when it is loaded."""
        raise TypeError(
            "mbkern: a GradAccumulator is not pickled: save state_dict(), and load it into one of "
            "the loaded parameters"
        )

    # ---- a window ---------------------------------------------------------------------------

    def begin(self, total: Number | Mapping[str, Number]) -> None:
        """Start a window of "known" mode: what its losses will be divided by.

        Args:
            total: a number or 0-dim tensor; with ``denominators``, a dict of them.
        """
        if self.mode != "known":
            raise RuntimeError(f"mbkern: begin() is for mode='known', this is {self.mode!r}")
        self._require_closed("begin()")
        if self._micro_batches:
            raise RuntimeError(f"mbkern: begin() after {self._micro_batches} micro-batches")
        totals = dict(total) if isinstance(total, Mapping) else {"": total}
        if set(totals) != set(self._names):
            raise ValueError(f"mbkern: total must name {sorted(self._names)}, not {sorted(totals)}")
        for name, value in totals.items():
            check_count(value, f"total {name}".strip())
        self._totals = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in totals.items()
        }

    def backward(self, loss: Tensor, count: Number | None = None, denominator: str = "") -> None:
        """Add the gradient of one micro-batch's loss: a sum over items, not their mean.

        Args:
            loss: 0-dim.
            count: how many items it sums, or the sum of their weights: a number or a 0-dim tensor
                of any dtype, which stays on its device. Optional in "known" mode only.
            denominator: which of ``denominators`` counts them.
        """
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(
                "mbkern: loss must be a 0-dim tensor, a sum over the items of the micro-batch, not "
                f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
            )
        with self._micro_batch(count, denominator):
            scaled = loss if self._pre_scale == 1 else loss * self._pre_scale
            scaled.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def micro_batch(self, count: Number | None = None, denominator: str = "") -> Iterator[None]:
        """Take the gradients of the backwards in the block. Arguments as for ``backward``.

        Not with ``pre_scale``, by which only ``backward`` multiplies.

        If the block raises before a gradient was added, the window is as it was before. After that
        the window is refused until ``reset()`` drops it or ``keep_partial()`` accepts it.
        """
        if self._pre_scale != 1:
            raise RuntimeError(
                f"mbkern: with pre_scale={self._pre_scale} use backward(loss, count), which "
                "multiplies the loss by it; a backward in a block does not"
            )
        with self._micro_batch(count, denominator):
            yield

    @contextmanager
    def _micro_batch(self, count: Number | None, denominator: str) -> Iterator[None]:
        self._require_whole()
        if not self._open.acquire(blocking=False):
            raise RuntimeError("mbkern: micro-batches cannot be nested, or run in several threads")
        try:
            yield from self._collect(count, denominator)
        finally:
            self._open.release()

    def _collect(self, count: Number | None, denominator: str) -> Iterator[None]:
        which = self._which(denominator)
        if count is None and self.mode != "known":
            raise ValueError(f"mbkern: mode {self.mode!r} needs the count of every micro-batch")
        counted = self._counts.get(denominator, Count()).copy()
        if count is not None:
            counted.add(count)
        put_hooks(self._slots, weakref.ref(self))
        require_no_gradients(self._slots)
        release(self._slots, self._into)
        require_no_sync(self._module)
        collector = self._collector = Collector(
            which,
            self._alpha(denominator),
            self._micro_batches,
            pre_scale=self._pre_scale,
            measure=self.measure,
            densify=self._densify,
        )
        self._lent = {}
        for slot in self._slots:
            if slot.lent:
                self._lend(slot)
        try:
            yield
            collector.finish()
            require_none_left(self._slots)
        except BaseException as error:
            collector.drop()
            by_kernels = [n for n, (b, version) in self._lent.items() if b._version != version]
            if collector.added or by_kernels:
                self._broken = (
                    f"micro-batch {self._micro_batches} failed ({type(error).__name__}: {error}) "
                    f"after {collector.added or 'some'} of its gradients had been added"
                )
                self._failed = (denominator, counted)
            discard(self._slots)
            raise
        finally:
            self._collector = None
        self._counts[denominator] = counted
        self._measurements += collector.measurements
        self._measured_whole &= not any(slot.lent for slot in self._slots)
        self._repeated |= collector.repeated
        if count is None:
            self._omitted.add(denominator)
        elif self.measure:
            # As it is now: a count may live on.
            as_now = count.detach().clone() if isinstance(count, Tensor) else count
            self._sizes[self._micro_batches] = as_now
        self._micro_batches += 1
        if self.mode == "streaming":
            self._write(keep=True)

    def buffer(self, parameter: Tensor, denominator: str = "") -> Tensor:
        """The buffer of a parameter, for a kernel that adds its gradient there itself.

        Sums, zeros at the start of a window; the parameter counts as having a gradient from now on.
        ``measure`` does not see what a kernel adds. In "known" mode the kernel must divide by the
        total. After ``flush`` ask again: the buffer may hold the gradient until then. Not with
        ``pre_scale``, which a kernel does not divide out.
        """
        if self._pre_scale != 1:
            raise RuntimeError(
                f"mbkern: buffer() does not go with pre_scale={self._pre_scale}: a kernel that "
                "adds into it does not divide that out"
            )
        which = self._which(denominator)
        for slot in self._slots:
            if slot.parameter is parameter:
                if slot.mesh is not None:
                    raise NotImplementedError(
                        f"mbkern: {slot.name} is sharded; FSDP reduces its gradient, so no kernel "
                        "can add it to the buffer of a shard"
                    )
                if not slot.received[which]:
                    release([slot], self._into)
                    slot.buffers[which].zero_()
                    slot.received[which] = True
                slot.lent = True
                self._lend(slot)
                return slot.buffers[which]
        raise KeyError("mbkern: this accumulator does not have that parameter")

    def flush(self, scaler: Any = None, optimizer: Any = None) -> WindowStats:
        """End the window: sums become gradients.

        Args:
            scaler: a ``torch.amp.GradScaler`` whose ``scale(loss)`` was given to ``backward``. Its
                scale is divided out and an overflow is recorded, so ``scaler.step(optimizer)``
                neither unscales again nor misses it; do not call ``unscale_``.
            optimizer: the one of ``scaler.step``; a list, if several step these parameters.

        Returns:
            A :class:`WindowStats`. Parameters without a gradient in this window have None.
        """
        self._require_closed("flush()")
        self._require_whole()
        if self._shards is not None:
            self._shards.require_reduced()
        self._check_known()
        grad_scale: Number = 1.0
        if scaler is not None:
            grad_scale = _accumulator_scaler.scale_of(
                scaler, optimizer, self._slots, self._micro_batches
            )
        if self._shards is not None and self.mode != "known":
            self._shards.reduce_counts(self._slots, self._counts, self._names)
        if self._group is not None:
            known = self.mode == "known"
            reduce_window(self._slots, self._counts, self._names, known, self._group)
        stats = self._write(keep=False, grad_scale=grad_scale)
        if scaler is not None:
            _accumulator_scaler.record(scaler, optimizer, stats.found_inf)
        self._forget()
        return stats

    def reset(self) -> None:
        """Drop the window: nothing of it is left."""
        self._require_closed("reset()")
        if self._shards is not None:
            self._shards.drop()
        if self.mode == "streaming" and self._micro_batches:
            release(self._slots, self._into)  # it was of this window
        self._forget()

    def keep_partial(self) -> None:
        """Go on with a window whose last micro-batch failed: what of it had been added stays, and
        its items count."""
        self._require_closed("keep_partial()")
        if self._failed is not None:
            name, counted = self._failed
            self._counts[name] = counted
            self._micro_batches += 1
            self._measured_whole = False
        self._broken = self._failed = None

    def state_dict(self) -> dict[str, Any]:
        """The window so far, between two micro-batches: copies of all sums, and the counts."""
        self._require_closed("state_dict()")
        self._require_whole()
        return _accumulator_state.save(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned: the window goes on with the same bits."""
        self._require_closed("load_state_dict()")
        _accumulator_state.load(self, state)

    # ---- inside ------------------------------------------------------------------------------

    def _which(self, denominator: str) -> int:
        if denominator not in self._names:
            raise ValueError(
                f"mbkern: denominator {denominator!r} is not declared: GradAccumulator(..., "
                f"denominators=...) has {[name for name in self._names if name]}"
            )
        return 0 if self.mode == "known" else self._names.index(denominator)

    def _alpha(self, denominator: str) -> Number:
        if self.mode != "known":
            return 1.0 / self._pre_scale
        if self._totals is None:
            raise RuntimeError("mbkern: mode='known' needs begin(total=...) before each window")
        return reciprocal(self._totals[denominator]) / self._pre_scale

    def _check_known(self) -> None:
        """In "known" mode, what was counted must be what was announced, where both are numbers."""
        if self._group is not None or self._shards is not None:  # of this rank's share only
            return
        for name, count in self._counts.items():
            announced = (self._totals or {}).get(name)
            if self.mode != "known" or count.tensor is not None or announced is None:
                continue
            if isinstance(announced, Tensor):
                continue
            if name in self._omitted or not count.number:
                continue
            if not math.isclose(count.number, announced, rel_tol=1e-6):  # sums of weights round
                raise ValueError(
                    f"mbkern: begin() announced a total of {announced} {name}, and {count.number} "
                    "were counted; reset() drops the window"
                )

    def _lend(self, slot: Slot) -> None:
        """Remember what a buffer was like before kernels may add to it."""
        for which, buffer in enumerate(slot.buffers):
            self._lent.setdefault(f"{slot.name} {which}", (buffer, buffer._version))

    def _require_closed(self, what: str) -> None:
        if self._collector is not None:
            raise RuntimeError(f"mbkern: {what} inside a micro-batch, before its gradients are in")

    def _require_whole(self) -> None:
        if self._broken:
            raise RuntimeError(
                f"mbkern: {self._broken}; reset() drops the window, keep_partial() goes on with it"
            )

    def _write(self, *, keep: bool, grad_scale: Number = 1.0) -> WindowStats:
        known, scaled = self.mode == "known", isinstance(grad_scale, Tensor) or grad_scale != 1.0
        counts = {name: self._counts.get(name, Count()).total() for name in self._names}
        totals: list[Number] = [1.0] if known else list(counts.values())
        options = FlushOptions(self._into, keep, grad_scale, self.max_norm, self._shards)
        stats, norms = write(self._slots, totals, options)
        head = (stats.norm, stats.clip_factor, stats.found_inf, stats.penalty, norms)
        plain = self._measured_whole and not self._repeated
        plain &= not (known or scaled or any(slot.l1 or slot.l2 for slot in self._slots))
        return WindowStats(
            *head, self._micro_batches, counts, list(self._measurements), dict(self._sizes),
            stats.norm.square() if plain else None, self._repeated,
        )  # fmt: skip

    def _forget(self) -> None:
        for slot in self._slots:
            slot.received = [False] * len(slot.received)
            slot.lent = False
        self._counts, self._totals, self._broken = {}, None, None
        self._measurements, self._sizes, self._micro_batches = [], {}, 0
        self._measured_whole, self._repeated, self._failed = True, False, None
        self._omitted, self._lent = set(), {}
