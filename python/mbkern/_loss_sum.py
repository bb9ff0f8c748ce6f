"""The exact sum of the losses of a mini-batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbkern import _launch
from mbkern._arguments import Number
from mbkern._tensors import describe, refuse_tracing, require_plain

_LIMBS = 9


class LossSum:
    """An exact, order-free sum of fp32 losses, in 96 bytes of integers.

    A call's own result is rounded, so adding results up depends on how a mini-batch was cut. Terms
    that go through one LossSum (``loss_and_grad(..., loss_sum=acc)``) give the correctly rounded
    sum for every cut, order, thread count and number of processes.

    Method: Kulisch's long accumulator for binary32: 288 bits of fixed point in nine int64 limbs,
    and three counters for NaN and the infinities.

    Args:
        device: where the state lives; it must be that of the losses.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        with torch.inference_mode(False):  # it may be needed after that mode
            self.state = torch.zeros(_LIMBS + 3, dtype=torch.int64, device=device)
        require_plain(self.state, "the state of a LossSum")

    def add(self, values: Tensor) -> LossSum:
        """Add every element of a float32, bfloat16 or float16 tensor; returns self."""
        values = require_plain(values, "values")  # a negated view's memory has the other signs
        refuse_tracing("LossSum")
        if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"mbkern: LossSum adds float32 and 16-bit values exactly, not {values.dtype}"
            )
        _launch.exact_add(self.state, values.detach())
        return self

    def merge(self, other: LossSum) -> LossSum:
        """Add another sum to this one; returns self.

        One from another device is copied here first, which waits if that is the host's or a GPU's.
        """
        if not isinstance(other, LossSum):
            raise TypeError(f"mbkern: merge takes a LossSum, not {type(other).__name__}")
        _launch.exact_merge(self.state, other.state.to(self.state.device, copy=True))
        return self

    def all_reduce(self, group: Any = None) -> LossSum:
        """Add up the sums of all ranks of a group, on each of them: one all-reduce of integers."""
        torch.distributed.all_reduce(self.state, op=torch.distributed.ReduceOp.SUM, group=group)
        _launch.exact_merge(self.state, torch.zeros_like(self.state))  # carries
        return self

    def value(
        self, denominator: Number | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the sum, correctly rounded to ``dtype``, as a 0-dim tensor.

        With ``denominator`` (a number or 0-dim tensor) the sum is rounded to fp64, divided, and
        rounded to ``dtype``.
        """
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"mbkern: dtype must be a torch.dtype, not {type(dtype).__name__}")
        return _launch.exact_result(self.state, denominator, dtype)

    def reset(self) -> LossSum:
        """Start again from zero; returns self."""
        self.state.zero_()
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as a dict of one int64 tensor of 12 elements."""
        return {"state": self.state.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state that ``state_dict`` returned."""
        if not isinstance(state, Mapping):
            raise TypeError(f"mbkern: state must be a dict, not {type(state).__name__}")
        loaded = state.get("state")
        if loaded is None:
            raise ValueError(f"mbkern: no state of a LossSum: it has no 'state' but {[*state]}")
        if not isinstance(loaded, Tensor):
            raise TypeError(
                f"mbkern: the state of a LossSum is a tensor, not {type(loaded).__name__}"
            )
        if loaded.shape != self.state.shape or loaded.dtype != torch.int64:
            raise ValueError(
                f"mbkern: the state of a LossSum is (12,) torch.int64, not {describe(loaded)}"
            )
        if loaded.layout is not torch.strided or loaded.is_meta:
            kind = "a meta tensor" if loaded.is_meta else f"of layout {loaded.layout}"
            raise TypeError(f"mbkern: the state of a LossSum is {kind}; it has no numbers to take")
        self.state.copy_(loaded)

    def __repr__(self) -> str:
        return (
            f"LossSum({self.value(dtype=torch.float64).item()!r}, "
            f"device={str(self.state.device)!r})"
        )
