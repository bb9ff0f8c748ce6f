"""Windows over several processes: sums and counts are added up over ranks, once, in flush.

Sums, not means: the shares may be uneven, and a rank may have no item at all. All-reduce is
torch.distributed's, over whole buffers in their own fp32 (fp64).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from mbkern._accumulator_counts import Count
from mbkern._accumulator_parameters import Slot


def require_no_sync(module: Any) -> None:
    """Refuse a backward that DistributedDataParallel would average, buffers half moved."""
    if getattr(module, "require_backward_grad_sync", False):
        raise RuntimeError(
            "mbkern: DistributedDataParallel would average the gradients of this micro-batch; run "
            "its forward and backward under `with module.no_sync():`, flush() adds up over ranks"
        )


def find_ddp(given: Any) -> Any:
    """The module that averages gradients in backward: ``given``, or what it wraps; or None."""
    if not isinstance(given, torch.nn.Module):
        return None
    found = [m for m in given.modules() if isinstance(m, torch.nn.parallel.DistributedDataParallel)]
    if len(found) > 1:
        raise ValueError(
            f"mbkern: the module contains {len(found)} DistributedDataParallel modules; give each "
            "an accumulator"
        )
    return found[0] if found else None


def check_group(group: Any) -> Any:
    """A group that this rank is of; None for False, and with a warning where that looks wrong."""
    if group is False or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized():
        if group is None:
            return None
        raise ValueError("mbkern: process_group is given, and torch.distributed not initialised")
    if group is not None:
        if torch.distributed.get_rank(group) < 0:
            raise ValueError("mbkern: this rank is not of the process_group given")
        return group
    if torch.distributed.get_world_size() > 1:
        warnings.warn(
            f"mbkern: torch.distributed has {torch.distributed.get_world_size()} ranks, and the "
            "sums of this GradAccumulator stay this rank's: give it the DistributedDataParallel "
            "module or process_group=, or process_group=False if that is meant",
            stacklevel=4,
        )
    return None


def reduce_window(
    slots: list[Slot], counts: dict[str, Count], names: tuple[str, ...], known: bool, group: Any
) -> None:
    """Make buffers and counts those of all ranks. Parameters that have a gradient on no rank get 0:
    finding out which would wait for the device."""
    for slot in slots:
        for which, buffer in enumerate(slot.buffers):
            if not slot.received[which]:
                buffer.zero_()
                slot.received[which] = slot.parameter.requires_grad
    memories: dict[int, Tensor] = {}
    for slot in slots:
        for buffer in slot.buffers:
            memory = buffer if buffer._base is None else buffer._base
            memories.setdefault(memory.data_ptr(), memory)
    if not slots:
        return
    device = slots[0].parameter.device
    totals = torch.zeros(len(names), dtype=torch.float64, device=device)
    for k, name in enumerate(names):
        totals[k] = counts.get(name, Count()).total()
    for memory in memories.values():
        if memory.numel():
            torch.distributed.all_reduce(_dense(memory), group=group)
    if known:  # the totals that were announced are of all ranks already
        return
    torch.distributed.all_reduce(totals, group=group)
    for k, name in enumerate(names):
        counts[name] = Count()
        counts[name].add(totals[k])


def _dense(memory: Tensor) -> Tensor:
    """The same memory as a contiguous vector: buffers fill theirs, in whatever order."""
    return memory.as_strided((memory.numel(),), (1,))
