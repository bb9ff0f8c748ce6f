"""The end of an accumulator's window: what is refused, and how sums become gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbkern import _accumulator_scaler
from mbkern._accumulator_counts import Count
from mbkern._accumulator_flush import FlushOptions, WindowStats, write
from mbkern._accumulator_hooks import require_none_stray, require_none_unknown, set_gradient
from mbkern._accumulator_lend import take_strays
from mbkern._arguments import Number

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator


def check_flush(acc: GradAccumulator, scaler: Any, optimizer: Any) -> Number:
    """Raise for what cannot be flushed, before anything is sent to other ranks; return the
    loss scale that is in the sums."""
    acc._require_closed("flush()")
    acc._window.require_whole()
    acc._members.require_known()
    require_none_stray(acc._members.all, acc._into)
    take_strays(acc)
    check_kept(acc)
    if acc.mode == "known" and acc._group is None and acc._shards is None:
        acc._window.check_totals()  # over ranks it has counted its own share only
    if scaler is None and optimizer is not None:
        optimizers = _accumulator_scaler.optimizers_of(optimizer)
        require_none_unknown(optimizers, acc._members.all)
    return scale_of(acc, scaler, optimizer)


def scale_of(acc: GradAccumulator, scaler: Any, optimizer: Any) -> Number:
    """The loss scale that is in the sums."""
    if scaler is None:
        return 1.0
    return _accumulator_scaler.scale_of(
        scaler, optimizer, acc._members.all, acc._window.micro_batches
    )


def check_kept(acc: GradAccumulator) -> None:
    """Raise where FSDP keeps what is not this window's."""
    # Also on a rank without a micro-batch: buffers are all-reduced.
    acc._members.update()
    if acc._shards is not None:
        acc._window.require_divisor(acc._shards.divisor())
        acc._shards.require_own(acc._window.kept)
        acc._shards.require_all_reduced()


def reduce_kept(acc: GradAccumulator) -> None:
    """Take over the gradients that FSDP has kept whole."""
    check_kept(acc)
    if acc._shards is not None and acc._shards.keep_any():
        acc._shards.reduce_kept(acc._window.factor(acc._names[0], acc._options))
        acc._window.kept = acc._shards.kept()


def write_gradients(acc: GradAccumulator, *, keep: bool, grad_scale: Number = 1.0) -> WindowStats:
    """Give parameters the gradient of the window so far; with ``keep`` the sums stay."""
    window, known = acc._window, acc.mode == "known"
    measurements = list(window.measurements)
    if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
        wide = grad_scale.double() if isinstance(grad_scale, Tensor) else grad_scale
        measurements = [
            replace(m, squared_norms=m.squared_norms / (wide * wide)) for m in measurements
        ]
    counts = {name: window.counts.get(name, Count()).total() for name in acc._names}
    totals: list[Number] = [1.0] if known else list(counts.values())
    options = FlushOptions(acc._into, keep, grad_scale, acc.max_norm, acc._shards)
    stats, norms = write(acc._members.slots, totals, options)
    head = (stats.norm, stats.clip_factor, stats.found_inf, stats.penalty, norms)
    for slot in acc._members.frozen:
        set_gradient(slot, None, acc._into)
    plain = window.measured_whole and not window.repeated
    plain &= not (known or any(slot.l1 or slot.l2 for slot in acc._members.slots))
    return WindowStats(
        *head, window.micro_batches, counts, measurements, dict(window.sizes),
        stats.norm.square() if plain else None, window.repeated,
        measured_whole=window.measured_whole and acc._options.measures,
    )  # fmt: skip


def share_of_clipped(acc: GradAccumulator, stats: WindowStats) -> Tensor:
    """Of the windows so far, this one with them, in which anything was added."""
    if acc._clipped is None:
        acc._clipped = stats.norm.new_zeros(2)
    if any(any(slot.received) for slot in acc._members.slots):
        finite = (stats.found_inf == 0).double()
        clipped = (stats.clip_factor < 1).double() * finite
        acc._clipped = acc._clipped + torch.stack([clipped, finite])
    return acc._clipped[0] / acc._clipped[1]
