"""Exact mini-batches: gradients summed over micro-batches, normalised once."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mbkern import _accumulator_scaler, _accumulator_state
from mbkern._accumulator_apart import Apart
from mbkern._accumulator_collect import Collector
from mbkern._accumulator_counts import as_count
from mbkern._accumulator_end import (
    check_flush,
    reduce_kept,
    scale_of,
    share_of_clipped,
    write_gradients,
)
from mbkern._accumulator_flush import WindowStats
from mbkern._accumulator_hooks import release, require_none_stray, unhook
from mbkern._accumulator_lend import lend, take_strays
from mbkern._accumulator_members import Members
from mbkern._accumulator_micro_batch import collect
from mbkern._accumulator_options import Options, require_scale
from mbkern._accumulator_ranks import find_ddp, find_group, reduce_window, share_buffers
from mbkern._accumulator_rounding import Rounding
from mbkern._accumulator_sharded import find_shards
from mbkern._accumulator_window import Window
from mbkern._arguments import Number
from mbkern._losses import as_number
from mbkern._noise_scale import NoiseScale


def _as_seed(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"mbkern: seed must be an integer, not {type(seed).__name__}") from None


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
    Either every micro-batch is reduced: a reduce-scatter each, and buffers of a shard's size; or,
    with ``set_requires_gradient_sync(False)``, FSDP keeps whole gradients in its ``reduce_dtype``
    meanwhile (choose float32), and ``flush`` reduces them, once a window; then there is one
    denominator, and a parameter without a gradient counts as one whose gradient is 0 if others of
    its group have one. Every rank must run every backward. What FSDP divides by is multiplied in
    again, in fp32, so ``set_gradient_divide_factor`` changes nothing; it sets that of one module,
    and must be the same for all, in all of a window. Over ranks go the counts and the squares of
    the norms, one all-reduce each.

    Args:
        parameters: a module, parameters, (name, parameter) pairs, or groups as optimizers have them
            (dicts with ``params``, perhaps ``l1`` and ``l2``). All on one device; float32,
            bfloat16, float16 or float64. A parameter named twice counts once; a frozen one, of
            whatever type, has no buffer and gets no gradient until it is unfrozen. Of a module,
            parameters that are replaced or added later are an error until ``add`` knows them; so
            are those that ``add_param_group`` adds to the ``optimizer.param_groups`` given here.
            Else ``flush(optimizer=...)`` refuses gradients that are no accumulator's.
            ``module.to(...)`` may change them between windows.
        dtype: of the buffers, float32, float64 or bfloat16; those of float64 parameters are
            float64.
        compensation: needed for bfloat16 buffers, whose 8 bits alone would lose what is added to a
            larger sum. "stochastic": rounded up or down by chance, right on average; half the
            memory of float32. "kahan": a second bfloat16 beside each, 16 bits in all; the memory
            of float32 and less exact, for where the buffer itself must be bfloat16. Of one process,
            and with one denominator only.
        seed: of chance, an integer.
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
            added: a power of two, which the loss's dtype can hold, that keeps fp16 gradients of
            sums from overflowing.
        sparse: "error", or "densify": what becomes of sparse gradients.
        measure: keep squared norms of every micro-batch's gradients (8 bytes a parameter).
        noise_scale: estimate the gradient noise scale: ``flush`` takes every window in that was
            measured whole, ``stats.noise_scale`` has the estimate, and the attribute
            ``noise_scale`` is the :class:`NoiseScale`. Includes ``measure``. Not with penalties,
            several denominators or "known" mode.
        process_group: ranks (a group, or ``torch.distributed.group.WORLD``) whose sums and counts
            ``flush`` adds up, by one all-reduce of each buffer memory (parameters that are unfrozen
            later have memories of their own); every rank must flush, and on the CPU what one rank
            refuses is an error on all, before anything is added up. The gradient is that of all
            ranks' items together, in shares of any size. A ``DistributedDataParallel`` module given
            as ``parameters`` brings its own group, and its micro-batches must run under its
            ``no_sync()``. In "known" mode the totals are those of all ranks. Parameters without a
            gradient on any rank get zeros then, and their penalty's gradient. An FSDP2 module has
            its own mesh: see above. Without a group, where there are several ranks, a warning says
            that sums stay this rank's; False says that it is meant.

    Raises:
        TypeError: complex or integer parameters, or not parameters at all.
        ValueError: unknown options or such as do not go together, parameters on several devices.
    """

    def __init__(
        self,
        parameters: Any,
        *,
        dtype: torch.dtype = torch.float32,
        layout: str = "flat",
        mode: str = "deferred",
        compensation: str | None = None,
        seed: int = 0,
        denominators: Sequence[str] = (),
        l1: float = 0.0,
        l2: float = 0.0,
        max_norm: float | None = None,
        into: str = "grad",
        pre_scale: float = 1.0,
        sparse: str = "error",
        measure: bool = False,
        noise_scale: bool = False,
        process_group: Any = None,
    ) -> None:
        self._options = Options(
            dtype=dtype, layout=layout, mode=mode, compensation=compensation,
            seed=_as_seed(seed), denominators=denominators, l1=as_number(l1, "l1"),
            l2=as_number(l2, "l2"), into=into, pre_scale=as_number(pre_scale, "pre_scale"),
            sparse=sparse, measure=measure, noise_scale=noise_scale,
        )  # fmt: skip
        self.mode, self.max_norm = mode, max_norm
        self.noise_scale = NoiseScale() if noise_scale else None
        self._rounding = Rounding(compensation, self._options.seed)
        self._names, self._into = self._options.names, into
        self._pre_scale = self._options.pre_scale
        self._shards = find_shards(parameters)
        self._module = find_ddp(parameters)
        self._group = find_group(process_group, self._module, self._shards, self._options)
        self._members = Members(self, self._options, self._shards)
        self._apart = Apart()
        self._clipped: Tensor | None = None  # windows that were clipped, and finite ones
        self._collector: Collector | None = None
        self._window = Window()
        self._open = threading.Lock()
        self.add(parameters)

    def add(self, parameters: Any) -> None:
        """Take more parameters, in any of the constructor's forms; known ones are passed over.

        Those that a module has replaced by others of their names give place to them, between
        windows.
        """
        self._require_closed("add()")
        module = find_ddp(parameters)
        if module is not None and module is not self._module:
            raise ValueError(
                "mbkern: a DistributedDataParallel module is given to the constructor: it brings "
                "its process group"
            )
        self._members.add(parameters, between_windows=not self._window.micro_batches)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        unhook(self._members.slots)

    @property
    def max_norm(self) -> float | None:
        """What the gradient is clipped to; may be set between windows."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        number = None if value is None else as_number(value, "max_norm")
        if number is not None and not number >= 0:
            raise ValueError(f"mbkern: max_norm is {value}; it must be at least 0, or None")
        self._max_norm = number

    def __deepcopy__(self, memo: dict[int, Any]) -> GradAccumulator:
        """A copy with buffers of its own, of the parameters' copies; of the same process group."""
        self._require_closed("a deepcopy")
        take_strays(self)
        other = object.__new__(type(self))
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            shared = name in ("_group", "_module", "_shards")
            if name == "_open":
                other.__dict__[name] = threading.Lock()
            elif name == "_members":
                other._members = self._members.copy_for(other, memo)
            else:
                other.__dict__[name] = value if shared else copy.deepcopy(value, memo)
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
        if self._window.micro_batches:
            raise RuntimeError(f"mbkern: begin() after {self._window.micro_batches} micro-batches")
        totals = dict(total) if isinstance(total, Mapping) else {"": total}
        if set(totals) != set(self._names):
            raise ValueError(f"mbkern: total must name {sorted(self._names)}, not {sorted(totals)}")
        counts = {name: as_count(value, f"total {name}".strip()) for name, value in totals.items()}
        self._window.totals = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in counts.items()
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
        if self._pre_scale != 1:
            require_scale(self._pre_scale, loss)
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
        self._window.require_whole()
        if not self._open.acquire(blocking=False):
            raise RuntimeError("mbkern: micro-batches cannot be nested, or run in several threads")
        try:
            yield from collect(self, count, denominator)
        finally:
            self._open.release()

    def buffer(self, parameter: Tensor, denominator: str = "") -> Tensor:
        """The buffer of a parameter, for a kernel that adds its gradient there itself.

        Sums, zeros at the start of a window; the parameter counts as having a gradient from now on.
        With ``measure`` it is a temporary of the buffer's size, zeros before each micro-batch,
        which is measured and added after it. In "known" mode the kernel must divide by the total,
        and what it adds is not measured. After ``flush`` ask again: the buffer may hold the
        gradient until then. Not with ``pre_scale``, which a kernel does not divide out, nor with
        bfloat16 buffers.
        """
        return lend(self, parameter, denominator)

    def flush(self, scaler: Any = None, optimizer: Any = None) -> WindowStats:
        """End the window: sums become gradients.

        Args:
            scaler: a ``torch.amp.GradScaler`` whose ``scale(loss)`` was given to ``backward``. Its
                scale is divided out and an overflow is recorded, so ``scaler.step(optimizer)``
                neither unscales again nor misses it; do not call ``unscale_``.
            optimizer: the one of ``scaler.step``; a list, if several step these parameters. Also
                without a scaler: its parameters that this accumulator does not know, as after
                ``add_param_group``, are an error if they have gradients, which are plain sums.

        Returns:
            A :class:`WindowStats`. Parameters without a gradient in this window have None.

        Raises:
            RuntimeError: a backward outside a micro-batch has left a gradient that would be
                overwritten, a micro-batch was added in part, or there are parameters that this
                accumulator does not know.
        """
        share_buffers(self._module)
        refused: Exception | None = None
        grad_scale: Number = 1.0
        try:
            grad_scale = check_flush(self, scaler, optimizer)
        except Exception as error:
            refused = error  # which the other ranks are told: they would wait for this one
        known, window = self.mode == "known", self._window
        if self._shards is not None:
            self._shards.agree(refused)
            reduce_kept(self)
            scale_of(self, scaler, optimizer)  # of what FSDP had kept, too
            if not known:
                self._shards.reduce_counts(window.counts, self._names)
        elif self._group is not None:
            reduce_window(self._members, window.counts, self._names, known, self._group, refused)
        elif refused is not None:
            raise refused
        try:
            stats = write_gradients(self, keep=False, grad_scale=grad_scale)
        except BaseException as error:
            window.broken = f"flush() failed ({type(error).__name__}: {error}) amid its sums"
            raise
        if scaler is not None:
            _accumulator_scaler.record(scaler, optimizer, stats.found_inf)
        if self.max_norm is not None:
            stats = replace(stats, clipped_share=share_of_clipped(self, stats))
        self._forget()
        if self.noise_scale is None:
            return stats
        if stats.sum_squared_norm is not None and stats.measurements:
            stats.update(self.noise_scale)
        return replace(stats, noise_scale=self.noise_scale.noise_scale)

    def reset(self) -> None:
        """Drop the window: nothing of it is left."""
        self._require_closed("reset()")
        if self._shards is not None:
            self._shards.drop()
        if self.mode == "streaming" and self._window.micro_batches:
            release(self._members.slots, self._into)  # it was of this window
        self._forget()

    def keep_partial(self) -> None:
        """Go on with a window whose last micro-batch failed: what of it had been added stays, and
        its items count."""
        self._require_closed("keep_partial()")
        if self.mode == "streaming":
            require_none_stray(self._members.all, self._into)
        failed = self._window.failed is not None
        self._window.keep_partial()
        if failed and self.mode == "streaming":
            write_gradients(self, keep=True)

    def state_dict(self) -> dict[str, Any]:
        """The window so far, between two micro-batches: copies of all sums, and the counts.

        Over several processes they are this rank's own: save one on every rank, and load each on
        its rank. Of a window that has not begun, any rank's will do. What FSDP has kept whole is
        reduced first, so every rank must call this then.
        """
        self._require_closed("state_dict()")
        self._window.require_whole()
        take_strays(self)
        reduce_kept(self)
        return _accumulator_state.save(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned: the window goes on with the same bits."""
        self._require_closed("load_state_dict()")
        if self.mode == "streaming":
            require_none_stray(self._members.all, self._into)
        _accumulator_state.load(self, state)
        if self.mode == "streaming" and self._window.micro_batches:
            write_gradients(self, keep=True)

    # ---- inside ------------------------------------------------------------------------------

    def _require_closed(self, what: str) -> None:
        if self._collector is not None:
            raise RuntimeError(f"mbkern: {what} inside a micro-batch, before its gradients are in")

    def _forget(self) -> None:
        for slot in self._members.slots:
            slot.received = [False] * len(slot.received)
            slot.lent = False
        self._apart = Apart()
        self._window = Window()
