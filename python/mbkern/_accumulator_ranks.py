"""Windows over several processes: sums and counts are added up over ranks, once, in flush.

Sums, not means: the shares may be uneven, and a rank may have no item at all. All-reduce is
torch.distributed's, over whole buffers in their own fp32 (fp64).
"""

from __future__ import annotations

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


def is_ddp(module: Any) -> bool:
    """Whether a module averages gradients in backward."""
    return isinstance(module, torch.nn.parallel.DistributedDataParallel)


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
