"""What the sums of a window are divided by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mbkern._arguments import Number
from mbkern._tensors import describe


class Count:
    """A running count: numbers are added on the host, tensors on their device, unseen."""

    def __init__(self) -> None:
        self.number: float = 0.0
        self.tensor: Tensor | None = None

    def add(self, count: Number) -> None:
        """Add what :func:`as_count` returned."""
        if not isinstance(count, Tensor):
            self.number += count
            return
        term = count.detach().to(torch.float64)
        self.tensor = term.clone() if self.tensor is None else self.tensor + term

    def total(self) -> Number:
        """The count so far; a float64 tensor if any part of it was a tensor."""
        return self.number if self.tensor is None else self.tensor + self.number

    def copy(self) -> Count:
        """An independent count of the same value; ``add`` never changes a tensor in place."""
        other = Count()
        other.number, other.tensor = self.number, self.tensor
        return other


def as_count(count: Any, name: str) -> Number:
    """A count as a plain number or a 0-dim tensor; raise if it is none. What a device holds is not
    looked at. NumPy's numbers would divide in their own 16 or 32 bits, and its arrays may change.
    """
    if isinstance(count, Tensor):
        if count.dim() != 0 or count.is_complex():
            raise ValueError(
                f"mbkern: {name} must be a number or a real 0-dim tensor, not {count.dtype} of "
                f"shape {tuple(count.shape)}"
            )
        if count.is_meta or count.layout is not torch.strided:
            raise ValueError(
                f"mbkern: {name} is {describe(count)}, layout {count.layout}; it must be dense and "
                "have a value"
            )
        if not count.is_cpu:
            return count
    try:
        wide = count.detach() if isinstance(count, Tensor) else count
        value = math.nan if isinstance(count, (str, bytes, bytearray)) else float(wide)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"mbkern: {name} is {count!r:.60}; it must be a finite number, at least 0")
    return count if type(count) is int or isinstance(count, Tensor) else value


def reciprocal(total: Number) -> Number:
    """1 / total, and 0 where it is 0: then the sums are empty. Nobody looks at a tensor."""
    if isinstance(total, Tensor):
        wide = total.detach().to(torch.float64)
        return torch.where(wide == 0, 0.0, 1.0 / wide)
    return 0.0 if total == 0 else 1.0 / total
