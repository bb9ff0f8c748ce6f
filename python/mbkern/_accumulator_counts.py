"""What the sums of a window are divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern._arguments import Number


class Count:
    """A running count: numbers are added on the host, tensors on their device, unseen."""

    def __init__(self) -> None:
        self.number: float = 0.0
        self.tensor: Tensor | None = None

    def add(self, count: Number) -> None:
        """Add a number or a 0-dim tensor."""
        if not isinstance(count, Tensor):
            if not count >= 0:
                raise ValueError(f"mbkern: count is {count}; it must be at least 0")
            self.number += float(count)
            return
        if count.dim() != 0:
            raise ValueError(
                f"mbkern: count must be a number or a 0-dim tensor, not {tuple(count.shape)}"
            )
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


def reciprocal(total: Number) -> Number:
    """1 / total, and 0 where it is 0: then the sums are empty. Nobody looks at a tensor."""
    if isinstance(total, Tensor):
        wide = total.detach().to(torch.float64)
        return torch.where(wide == 0, 0.0, 1.0 / wide)
    return 0.0 if total == 0 else 1.0 / total
