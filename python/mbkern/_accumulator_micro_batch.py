"""One micro-batch of an accumulator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from mbkern._accumulator_collect import Collector
from mbkern._accumulator_counts import Count, as_count
from mbkern._accumulator_end import write_gradients
from mbkern._accumulator_hooks import discard, release, require_no_gradients, require_none_left
from mbkern._accumulator_lend import remember, take_strays
from mbkern._accumulator_ranks import require_no_sync
from mbkern._arguments import Number

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator


def collect(acc: GradAccumulator, count: Number | None, denominator: str) -> Iterator[None]:
    """From the check of the arguments to the end of the block, which is where it yields."""
    which, window = acc._options.set_of(denominator), acc._window
    if count is None and acc.mode != "known":
        raise ValueError(f"mbkern: mode {acc.mode!r} needs the count of every micro-batch")
    counted = window.counts.get(denominator, Count()).copy()
    size: Number = 0
    if count is not None:
        size = as_count(count, "count")
        counted.add(size)
        if isinstance(size, Tensor) and acc._options.measures:
            size = size.detach().clone()  # as it is now: it may live on
    alpha = window.factor(denominator, acc._options)
    if not window.micro_batches:
        acc._members.require_known()
    acc._members.update()
    acc._members.hook()
    require_no_gradients(acc._members.all)
    if acc._shards is not None:
        acc._shards.require_own(window.kept)
        window.require_divisor(acc._shards.divisor())
    require_no_sync(acc._module)
    release(acc._members.slots, acc._into)
    take_strays(acc)
    collector = acc._collector = Collector(
        which,
        alpha,
        window.micro_batches,
        pre_scale=acc._pre_scale,
        measure=acc._options.measures,
        densify=acc._options.sparse == "densify",
        rounding=acc._rounding,
    )
    window.lent = {}
    for slot in acc._members.slots:
        if slot.lent and slot not in acc._apart:
            remember(acc, slot)
    before = () if acc._shards is None else acc._shards.kept()
    try:
        yield
        collector.finish()
        collector.take_apart(acc._apart)
        require_none_left(acc._members.all)
        if acc._shards is not None:
            acc._shards.require_apart(acc._names)
    except BaseException as error:
        collector.drop()
        acc._apart.drop()
        by_kernels = [n for n, (b, version) in window.lent.items() if b._version != version]
        kept_more = acc._shards is not None and acc._shards.kept() != before
        if collector.added or by_kernels or kept_more:
            window.broken = (
                f"micro-batch {window.micro_batches} failed ({type(error).__name__}: {error}) "
                f"after {collector.added or 'some'} of its gradients had been added"
            )
            window.failed = (denominator, counted)
        discard(acc._members.all)
        acc._collector = None
        if acc.mode == "streaming" and not window.broken and window.micro_batches:
            write_gradients(acc, keep=True)
        raise
    finally:
        acc._collector = None
        if acc._shards is not None:
            window.kept = acc._shards.kept()
    window.counts[denominator] = counted
    window.measurements += collector.measurements
    slots = acc._members.slots
    window.measured_whole &= not any(s.lent and s not in acc._apart for s in slots)
    window.repeated |= collector.repeated
    if count is None:
        window.omitted.add(denominator)
    elif acc._options.measures:
        window.sizes[window.micro_batches] = size
    window.micro_batches += 1
    if acc.mode == "streaming":
        write_gradients(acc, keep=True)
