"""Memory that kernels add to in the place of a buffer, so that what they add can be measured."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern._accumulate import accumulate_
from mbkern._accumulator_parameters import Slot


class Apart:
    """For each buffer that was lent while norms are wanted, a temporary of its size: zeros between
    micro-batches."""

    def __init__(self) -> None:
        self._lent: dict[tuple[Slot, int], tuple[Tensor, int]] = {}  # and its version when it was 0

    def __deepcopy__(self, memo: dict[int, object]) -> Apart:
        """A copy has lent nothing."""
        return Apart()

    def __contains__(self, slot: Slot) -> bool:
        return any(known is slot for known, _ in self._lent)

    def lend(self, slot: Slot, which: int) -> Tensor:
        """What a kernel is to add to instead of the slot's buffer of this set."""
        key = slot, which
        if key not in self._lent:
            with torch.inference_mode(False):
                memory = torch.zeros_like(slot.buffers[which])
            self._lent[key] = memory, memory._version
        return self._lent[key][0]

    def take(self, *, measure: bool) -> tuple[list[Slot], Tensor | None]:
        """Add what kernels have added since to the buffers; whose it was, and with ``measure`` the
        squared norms."""
        changed = [key for key, (memory, at) in self._lent.items() if memory._version != at]
        if not changed:
            return [], None
        buffers = [slot.buffers[which] for slot, which in changed]
        added = [self._lent[key][0] for key in changed]
        if measure:
            squares = accumulate_(buffers, added, measure=True).squared_norms
        else:
            accumulate_(buffers, added)
            squares = None
        self._clear(changed)
        return [slot for slot, _ in changed], squares

    def drop(self) -> None:
        """Forget what kernels have added since."""
        self._clear(list(self._lent))

    def _clear(self, keys: list[tuple[Slot, int]]) -> None:
        for key in keys:
            memory = self._lent[key][0].zero_()
            self._lent[key] = memory, memory._version
