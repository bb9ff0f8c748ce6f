"""What a plan is asked for, read and checked before anything is measured."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor

from mbkern._losses import as_number
from mbkern._noise_scale import NoiseScale
from mbkern._plan_fit import SHARES
from mbkern._plan_measure import Ranks


class Options:
    """The arguments of ``plan`` beside step and sample, of one type each.

    Attributes:
        batch: items of the mini-batch.
        limit: bytes, or None.
        objective: one of ``SHARES``.
        share: of the best throughput that it asks for.
        seconds: to measure.
        noise: the noise scale.
    """

    def __init__(
        self, batch_size: Any, memory_limit: Any, objective: Any, seconds: Any, noise_scale: Any
    ) -> None:
        self.batch = _items(batch_size)
        if not isinstance(objective, str) or objective not in SHARES:
            raise ValueError(f"mbkern: objective must be one of {', '.join(SHARES)}: {objective!r}")
        self.objective, self.share = objective, SHARES[objective]
        self.seconds = _finite(seconds, "seconds")
        self.limit = None if memory_limit is None else int(_finite(memory_limit, "memory_limit"))
        self.noise = Noise(noise_scale)

    def agree(self, ranks: Ranks) -> None:
        """Raise where ranks were asked for different plans; the shortest time counts."""
        for value, name in ((float(self.batch), "batch_size"), (self.share, "objective's share")):
            least, most = ranks.least(value), -ranks.least(-value)
            if least != most:
                raise ValueError(
                    f"mbkern: the {name} is {value:g} here, {least:g} to {most:g} elsewhere"
                )
        self.seconds = ranks.least(self.seconds)
        self.noise.agree(ranks)


def _items(batch_size: Any) -> int:
    try:
        items = operator.index(batch_size)
    except TypeError:
        raise TypeError(
            f"mbkern: batch_size must be an integer, not {type(batch_size).__name__}"
        ) from None
    if not 1 <= items < 1 << 53:
        raise ValueError(f"mbkern: batch_size is {items}; it must be at least 1 and below 2^53")
    return items


def _finite(value: Any, name: str) -> float:
    number = as_number(value, name)
    if not 0 <= number < math.inf:
        raise ValueError(f"mbkern: {name} is {number:g}; it must be finite and at least 0")
    return number


class Noise:
    """The noise scale that a plan was given.

    Attributes:
        scale: in items; None where it is not known.
        notes: why it is not, if one was given. Both as of all ranks, after ``agree``.
    """

    def __init__(self, given: Any) -> None:
        self.scale: float | None = None
        self.notes: list[str] = []
        self._estimate: float | None = None
        if given is None:
            return
        if isinstance(given, str):
            raise ValueError(f"mbkern: noise_scale is {given!r}; it must be a number")
        estimate = given.noise_scale if isinstance(given, NoiseScale) else given
        value = as_number(estimate, "noise_scale")
        if value > 0 and math.isfinite(value):
            self.scale = value
        elif isinstance(given, NoiseScale | Tensor) or math.isnan(value):
            self._estimate = value
        else:
            raise ValueError(f"mbkern: noise_scale is {value:g}; it must be positive and finite")

    def agree(self, ranks: Ranks) -> None:
        """Take the smallest that is known on any rank: each may have an estimate of its own."""
        estimate = math.nan if self._estimate is None else self._estimate
        known, least, unknown = (
            ranks.least(math.inf if value is None else value)
            for value in (
                self.scale,
                None if math.isnan(estimate) else estimate,
                None if self._estimate is None else 0.0,
            )
        )
        self.scale = known if math.isfinite(known) else None
        if self.scale is None and unknown == 0:
            shown = least if math.isfinite(least) else math.nan
            self.notes.append(f"the noise scale is not known yet: its estimate is {shown:.4g}")
