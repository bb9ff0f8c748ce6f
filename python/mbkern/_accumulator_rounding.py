"""Sums kept in bfloat16, whose 8 bits alone would lose what is added to them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mbkern._accumulator_parameters import Slot

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Rounding:
    """How additions into bfloat16 buffers are rounded.

    Attributes:
        kind: "kahan": a low part beside each buffer; "stochastic": by chance; None: there are none.
        seed: of chance.
    """

    kind: str | None
    seed: int

    def arguments(self, slots: Sequence[Slot], which: int) -> dict[str, Any]:
        """What :func:`accumulate_` needs besides the buffers; another chance each time."""
        if self.kind is None:
            return {}
        if self.kind == "kahan":
            return {"compensation": low_parts(slots, which)}
        seeds = []
        for slot in slots:
            seeds.append(_seed(self.seed, _number(slot.name), slot.additions))
            slot.additions += 1
        return {"seeds": seeds}


def low_parts(slots: Iterable[Slot], which: int) -> list[Any] | None:
    """What the slots' buffers cannot hold; None if they hold all."""
    low = [slot.low[which] for slot in slots]
    return None if all(tensor is None for tensor in low) else low


@functools.cache
def _number(name: str) -> int:
    """64 bits of a name: a state is loaded by names, in whatever order parameters come."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _seed(*numbers: int) -> int:
    """53 bits for some numbers. Method: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = 0
    for number in numbers:
        x = (x + 0x9E3779B97F4A7C15 + number) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return x >> 11
