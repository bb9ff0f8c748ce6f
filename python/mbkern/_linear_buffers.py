"""Where the head's weight gradient goes besides ``.grad``: ``accumulate_into``.

Three protocols. A tensor is added into. ``"grad"`` adds into the weight's own ``.grad``, and
creates it. ``"main_grad"`` is Megatron-LM's: the weight carries ``main_grad``, added into, or
overwritten where ``overwrite_main_grad`` is true; ``grad_added_to_main_grad`` is set where it is
there, and backward returns a gradient of no meaning, so that hooks run (zeros where
``zero_out_wgrad``).
"""

from __future__ import annotations

import math
import sys
from typing import TypeAlias

import torch
from torch import Tensor

from mbkern._launch import new_zeros
from mbkern._tensors import describe, has_internal_overlap, require_plain, share_memory

Destination: TypeAlias = "Tensor | str"


def owner_of(weight: Tensor) -> Tensor:
    """The leaf whose ``.grad`` or ``main_grad`` is meant: the weight, or what it is a view of."""
    base = weight._base
    if not weight.is_leaf and base is not None and base.is_leaf and weight.is_contiguous():
        return base if base.numel() == weight.numel() else weight
    return weight


def check(destination: Destination, weight: Tensor, others: tuple[Tensor | None, ...]) -> None:
    """Refuse a destination that the gradient of ``weight`` cannot be added into."""
    if isinstance(destination, Tensor):
        _check_tensor(destination, weight, others)
    elif not isinstance(destination, str):
        raise TypeError(
            "mbkern: accumulate_into is a tensor, 'grad' or 'main_grad', not "
            f"{type(destination).__name__}"
        )
    elif destination == "main_grad":
        buffer = getattr(owner_of(weight), "main_grad", None)
        if not isinstance(buffer, Tensor):
            raise ValueError(
                "mbkern: accumulate_into='main_grad' needs a weight that has the attribute "
                f"main_grad, a tensor; it is {type(buffer).__name__}"
            )
        _check_tensor(buffer, weight, others)
    elif destination == "grad":
        owner = owner_of(weight)
        if not owner.is_leaf:
            raise ValueError(
                "mbkern: accumulate_into='grad' needs a weight that is a leaf, or a view of all of "
                "one; this one is the result of a computation"
            )
        dtype = gradient_dtype(owner)
        if dtype is not owner.dtype and _is_in_data_parallel(owner):  # fails when .grad is written
            raise ValueError(
                f"mbkern: accumulate_into='grad' of a {owner.dtype} weight whose grad_dtype is "
                f"{dtype}: DistributedDataParallel reduces gradients of the weight's dtype only"
            )
        if owner.grad is not None:
            _check_tensor(owner.grad, weight, others)
    else:
        raise ValueError(
            f"mbkern: accumulate_into is a tensor, 'grad' or 'main_grad', not {destination!r}"
        )


def _check_tensor(buffer: Tensor, weight: Tensor, others: tuple[Tensor | None, ...]) -> None:
    if require_plain(buffer, "accumulate_into") is not buffer:
        raise ValueError("mbkern: accumulate_into is a negated view; it cannot be written to")
    shapes = (weight.shape, owner_of(weight).shape)
    if buffer.shape not in shapes or not buffer.is_floating_point():
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
    """One backward's way to a destination: memory to add into, and what to return to autograd.

    Args:
        destination: None: into what backward returns.
        weight: what the gradient is of; the caller's own tensor, which carries the protocols.
        wide: the type that sums are held in.
        others: the other tensors of the call, which the destination may not overlap.
    """

    def __init__(
        self,
        destination: Destination | None,
        weight: Tensor,
        wide: torch.dtype,
        others: tuple[Tensor | None, ...] = (),
    ) -> None:
        if destination is not None:
            check(destination, weight, others)  # it may have changed since forward
        self._owner = owner_of(weight)
        if destination == "grad" and _in_compiled_autograd():
            destination = None  # it takes back what is set behind its back, and adds no None
        self._weight, self._destination = weight, destination
        self._buffer = self._find(destination)
        shape = (math.prod(weight.shape[:-1]), weight.shape[-1])
        flat: Tensor | None = None
        if self._buffer is not None and self._buffer.dtype is wide:
            flat = self._buffer.view(shape) if self._buffer.is_contiguous() else None
        self._direct = flat is not None
        if flat is None:
            flat = new_zeros(shape, wide, weight.device)
        #: (classes, in_features), in the type that sums are held in; added into.
        self.memory = flat

    def _find(self, destination: Destination | None) -> Tensor | None:
        if isinstance(destination, Tensor):
            return destination
        if destination == "main_grad":
            buffer: Tensor = self._owner.main_grad  # type: ignore[attr-defined]
            if getattr(self._owner, "overwrite_main_grad", False):
                _overwrite(buffer)
            return buffer
        return self._owner.grad if destination == "grad" else None

    def finish(self) -> Tensor | None:
        """Complete the accumulation; return what backward returns for the weight."""
        weight, owner, memory, buffer = self._weight, self._owner, self.memory, self._buffer
        del self.memory
        if buffer is not None and self._direct:
            torch.autograd.graph.increment_version(buffer)  # the kernels wrote, not torch
        elif buffer is not None:
            buffer.add_(memory.view(buffer.shape))
        if self._destination is None:
            shaped = memory if memory.shape == weight.shape else memory.view(weight.shape)
            return shaped.to(gradient_dtype(weight))
        if self._destination == "grad" and buffer is None:
            owner.grad = memory.view(owner.shape).to(gradient_dtype(owner))
        if self._destination == "main_grad" and hasattr(owner, "grad_added_to_main_grad"):
            owner.grad_added_to_main_grad = True
            if getattr(owner, "zero_out_wgrad", False) or torch.is_anomaly_enabled():
                return torch.zeros_like(weight)
            return torch.empty_like(weight)
        return None


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """What a gradient is rounded to: the tensor's dtype, or what its leaf asks for."""
    asked = getattr(tensor, "grad_dtype", None) if tensor.is_leaf else None
    return asked or tensor.dtype


def _is_in_data_parallel(parameter: Tensor) -> bool:
    """Whether this is in the forward of a DistributedDataParallel that has the parameter."""
    kind = getattr(torch.nn.parallel, "DistributedDataParallel", None)
    module = getattr(kind, "_active_ddp_module", None)
    return module is not None and any(p is parameter for p in module.parameters())


def _in_compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


def _overwrite(buffer: Tensor) -> None:
    """Start a buffer from 0, once in a backward: other calls with the same weight add to it."""
    task = torch._C._current_graph_task_id()
    if task < 0 or getattr(buffer, "_mbkern_task", None) != task:
        buffer.zero_()
    buffer._mbkern_task = task  # type: ignore[attr-defined]
