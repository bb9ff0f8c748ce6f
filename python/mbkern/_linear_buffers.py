"""Where the head's weight gradient goes besides ``.grad``: ``accumulate_into``.

Three protocols. A tensor is added into. ``"grad"`` adds into the weight's own ``.grad``, and
creates it. ``"main_grad"`` is Megatron-LM's: the weight carries ``main_grad``, added into, or
overwritten where ``overwrite_main_grad`` is true; ``grad_added_to_main_grad`` is set where it is
there, and backward returns a gradient of no meaning, so that hooks run (zeros where
``zero_out_wgrad``).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from mbkern._arguments import compute_dtype
from mbkern._launch import new_zeros
from mbkern._tensors import describe, has_internal_overlap, require_plain, share_memory

Destination: TypeAlias = "Tensor | str"


def check(destination: Destination, weight: Tensor, others: tuple[Tensor | None, ...]) -> None:
    """Refuse a destination that the gradient of ``weight`` cannot be added into."""
    if isinstance(destination, Tensor):
        _check_tensor(destination, weight, others)
    elif destination == "main_grad":
        buffer = getattr(weight, "main_grad", None)
        if not isinstance(buffer, Tensor):
            raise ValueError(
                "mbkern: accumulate_into='main_grad' needs a weight that has the attribute "
                f"main_grad, a tensor; it is {type(buffer).__name__}"
            )
        _check_tensor(buffer, weight, others)
    elif destination == "grad":
        if not weight.is_leaf:
            raise ValueError(
                "mbkern: accumulate_into='grad' needs a weight that is a leaf; this one is the "
                "result of a computation"
            )
    else:
        raise ValueError(
            f"mbkern: accumulate_into is a tensor, 'grad' or 'main_grad', not {destination!r}"
        )


def _check_tensor(buffer: Tensor, weight: Tensor, others: tuple[Tensor | None, ...]) -> None:
    require_plain(buffer, "accumulate_into")
    if buffer.shape != weight.shape or not buffer.is_floating_point():
        raise ValueError(
            f"mbkern: accumulate_into must be floating, of the weight's shape "
            f"{tuple(weight.shape)}, not {describe(buffer)}"
        )
    if buffer.device != weight.device:
        raise ValueError(
            f"mbkern: accumulate_into is on {buffer.device}, and the weight on {weight.device}"
        )
    if buffer.requires_grad:
        raise ValueError("mbkern: accumulate_into requires grad; pass it detached")
    if has_internal_overlap(buffer):
        raise ValueError(
            f"mbkern: accumulate_into has elements that share memory, {describe(buffer)}"
        )
    for other in (weight, *others):
        if other is not None and share_memory(buffer, other):
            raise ValueError(
                f"mbkern: accumulate_into overlaps another argument, {describe(other)}"
            )


class Accumulation:
    """One backward's way to a destination: memory to add into, and what to return to autograd."""

    def __init__(self, destination: Destination | None, weight: Tensor) -> None:
        self._weight, self._destination = weight, destination
        wide = compute_dtype(weight.dtype)
        self._buffer = self._find(destination, weight)
        flat = None
        if self._buffer is not None and self._buffer.dtype is wide:
            flat = self._buffer.view(-1, weight.shape[-1]) if _is_flat(self._buffer) else None
        self._direct = flat is not None
        rows = weight.numel() // max(1, weight.shape[-1])
        #: (classes, in_features), in the type that sums are held in; added into.
        if flat is None:
            flat = new_zeros((rows, weight.shape[-1]), wide, weight.device)
        self.memory = flat

    def _find(self, destination: Destination | None, weight: Tensor) -> Tensor | None:
        if isinstance(destination, Tensor):
            return destination
        if destination == "main_grad":
            buffer: Tensor = weight.main_grad  # type: ignore[attr-defined]
            if getattr(weight, "overwrite_main_grad", False):
                buffer.zero_()
            return buffer
        if destination == "grad":
            return weight.grad
        return None

    def finish(self) -> Tensor | None:
        """Complete the accumulation; return what backward returns for the weight."""
        weight, memory = self._weight, self.memory
        del self.memory
        if self._buffer is not None and not self._direct:
            self._buffer.add_(memory.view(weight.shape))
        if self._destination is None:
            shaped = memory if memory.shape == weight.shape else memory.view(weight.shape)
            return shaped.to(weight.dtype)
        if self._destination == "grad":
            if self._buffer is None:
                dtype = getattr(weight, "grad_dtype", None) or weight.dtype
                weight.grad = memory.view(weight.shape).to(dtype)
            return None
        if self._destination == "main_grad" and hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            if getattr(weight, "zero_out_wgrad", False):
                return torch.zeros_like(weight)
            return torch.empty_like(weight)
        return None


def _is_flat(buffer: Tensor) -> bool:
    return buffer.is_contiguous()
