"""Buffers that kernels add gradients to themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mbkern._accumulator_hooks import release
from mbkern._accumulator_parameters import Slot

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator


def lend(acc: GradAccumulator, parameter: Tensor, denominator: str) -> Tensor:
    """What ``GradAccumulator.buffer`` returns."""
    if acc._rounding.kind is not None:
        raise NotImplementedError(
            f"mbkern: buffer() does not go with compensation={acc._rounding.kind!r}: a kernel "
            "that adds into it would round to bfloat16"
        )
    if acc._pre_scale != 1:
        raise RuntimeError(
            f"mbkern: buffer() does not go with pre_scale={acc._pre_scale}: a kernel that "
            "adds into it does not divide that out"
        )
    which = acc._options.set_of(denominator)
    acc._members.thaw(s for s in acc._members.frozen if s.parameter is parameter)
    for slot in acc._members.slots:
        if slot.parameter is parameter:
            if slot.mesh is not None:
                raise NotImplementedError(
                    f"mbkern: {slot.name} is sharded; FSDP reduces its gradient, so no kernel "
                    "can add it to the buffer of a shard"
                )
            if slot.made_for != slot.likeness:
                acc._members.renew([slot])
            if not slot.received[which]:
                release([slot], acc._into)
                # Not a kernel's doing: views of one allocation share their version.
                slot.buffers[which].data.zero_()
                slot.received[which] = True
            slot.lent = True
            if acc._options.measures and acc.mode != "known":
                return acc._apart.lend(slot, which)
            if acc.mode == "known":
                acc._window.measured_whole = False
            remember(acc, slot)
            return slot.buffers[which]
    raise KeyError("mbkern: this accumulator does not have that parameter")


def remember(acc: GradAccumulator, slot: Slot) -> None:
    """Remember what a buffer was like before kernels may add to it."""
    for which, buffer in enumerate(slot.buffers):
        acc._window.lent.setdefault(f"{slot.name} {which}", (buffer, buffer._version))


def take_strays(acc: GradAccumulator) -> None:
    """Add what kernels have added apart outside a micro-batch."""
    if acc._apart.take(measure=False)[0]:
        acc._window.measured_whole = False
