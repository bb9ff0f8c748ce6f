"""The hooks by which gradients reach an accumulator, and what lies in ``.grad`` meanwhile."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from mbkern._accumulator_parameters import Slot

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator


class _Hook:
    """Hands a gradient to the accumulator of the parameter, while that collects.

    It owns neither, so a model may outlive its accumulator; copies and pickles of parameters leave
    hooks out.
    """

    def __init__(self, accumulator: weakref.ref[GradAccumulator], slot: Slot) -> None:
        self._accumulator, self._slot = accumulator, weakref.ref(slot)

    def __call__(self, _: Tensor) -> None:
        accumulator, slot = self._accumulator(), self._slot()
        if accumulator is not None and slot is not None and accumulator._collector is not None:
            accumulator._collector.take(slot)


def hook(slots: list[Slot], accumulator: weakref.ref[GradAccumulator]) -> None:
    """Put a hook on every parameter that requires grad and has none yet."""
    for slot in slots:
        if slot.handle is None and slot.parameter.requires_grad:
            register = slot.parameter.register_post_accumulate_grad_hook
            slot.handle = register(_Hook(accumulator, slot))  # type: ignore[no-untyped-call]


def unhook(slots: list[Slot]) -> None:
    """Take the hooks off again."""
    for slot in slots:
        if slot.handle is not None:
            slot.handle.remove()
            slot.handle = None


def set_gradient(slot: Slot, grad: Tensor | None, into: str) -> None:
    """Put a gradient where the optimizer looks for it."""
    if into == "main_grad":
        slot.parameter.main_grad = grad  # type: ignore[attr-defined]
    else:
        slot.parameter.grad = grad
    slot.given = grad


def release(slots: list[Slot], into: str) -> None:
    """Take back what was handed out: it may lie in a buffer, and autograd would add to it."""
    for slot in slots:
        if slot.given is not None:
            held = slot.parameter.grad
            if into == "main_grad" or held is slot.given:
                set_gradient(slot, None, into)
            slot.given = None


def require_no_gradients(slots: list[Slot]) -> None:
    """Raise if a parameter has a gradient that was not handed out here: it would be counted."""
    for slot in slots:
        grad = slot.parameter.grad
        if grad is not None and grad is not slot.given:
            raise RuntimeError(
                f"mbkern: {slot.name} has a gradient that is not this accumulator's; clear it "
                "(optimizer.zero_grad()) before a micro-batch, or it would be counted"
            )


def discard(slots: list[Slot]) -> None:
    """Drop the gradients of a backward that failed."""
    for slot in slots:
        slot.parameter.grad = None
