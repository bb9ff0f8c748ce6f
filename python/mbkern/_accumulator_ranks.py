"""Windows over several processes: sums and counts are added up over ranks, once, in flush.

Sums, not means: the shares may be uneven, and a rank may have no item at all. All-reduce is
torch.distributed's, over whole buffers in their own fp32 (fp64).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbkern._accumulator_counts import Count
from mbkern._accumulator_parameters import Slot

if TYPE_CHECKING:
    from mbkern._accumulator_members import Members
    from mbkern._accumulator_options import Options
    from mbkern._accumulator_sharded import Shards


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


def find_group(process_group: Any, module: Any, shards: Shards | None, options: Options) -> Any:
    """The ranks to add up over in flush, or None; raise for what does not go with several."""
    if module is not None:
        process_group = group_of(module, process_group)
    several = process_group not in (None, False)
    if shards is not None:
        if options.mode == "streaming" or options.measures:
            raise NotImplementedError(
                "mbkern: mode='streaming', measure=True and noise_scale=True do not go with "
                "FSDP modules: the norm of a shard is not the parameter's"
            )
        if several:
            raise ValueError("mbkern: an FSDP module has its own mesh; no process_group= then")
        process_group = False
    if several and options.mode == "streaming":
        raise ValueError(
            "mbkern: mode='streaming' promises a gradient after each micro-batch, which would "
            "be an all-reduce each; use 'deferred' with a process_group"
        )
    if options.compensation is not None and (several or shards is not None):
        raise NotImplementedError(
            "mbkern: bfloat16 buffers are not added up over ranks; use float32 ones"
        )
    return check_group(process_group)


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


def group_of(module: Any, given: Any) -> Any:
    """The group of a DistributedDataParallel module; raise if another one is asked for."""
    own = module.process_group
    if given is not None and given is not own:
        raise ValueError(
            "mbkern: the DistributedDataParallel module brings its own process group; "
            f"process_group={given!r} is another: leave it out, or give the module that is wrapped"
        )
    return own


def place_in(group: Any) -> tuple[int, int]:
    """This process's rank, and of how many."""
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def check_place(saved: Any, here: tuple[int, int], shards: bool) -> None:
    """Raise for the sums of another rank, or where those of some ranks would be lost."""
    if saved is None:  # of an older version
        return
    pair = isinstance(saved, tuple | list) and [type(n) for n in saved] == [int, int]
    if not pair:
        raise ValueError(f"mbkern: not the state of a GradAccumulator: its place is {saved!r}")
    (rank, world), (own, now) = saved, here
    if rank != own or world > now or (shards and world != now):
        raise ValueError(
            f"mbkern: the state has the sums of rank {rank} of {world} in mid-window, and this is "
            f"rank {own} of {now}: sums are each rank's own, so save a state on every rank, and "
            "load each once; ranks that come in addition begin without"
        )


def share_buffers(module: Any) -> None:
    """Take part in the broadcast of module buffers that DistributedDataParallel's first forward
    starts, on a rank that has run none: the others wait for it."""
    if module is not None and getattr(module, "_check_sync_bufs_pre_fwd", bool)():
        module._sync_buffers()
        module.require_forward_param_sync = False  # as a forward under no_sync() leaves it


def agree(
    refused: Exception | None, marks: list[bool], groups: list[Any], device: torch.device
) -> list[bool]:
    """Raise on every rank what one has refused; else say which marks are set on any rank.

    Waits for the device: for the CPU, or where there is no other way.
    """
    found = torch.tensor([refused is not None, *marks], dtype=torch.int32, device=device)
    for group in groups:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    anywhere = [bool(value) for value in found.tolist()]
    if refused is not None:
        raise refused
    if anywhere[0]:
        raise RuntimeError(
            "mbkern: flush() was refused on another rank, which says why; nothing was added up, "
            "and the window of this rank is as it was"
        )
    return anywhere[1:]


def reduce_window(
    members: Members, counts: dict[str, Count], names: tuple[str, ...], known: bool, group: Any,
    refused: Exception | None,
) -> None:  # fmt: skip
    """Make buffers and counts those of all ranks; or raise what a rank has refused, on all of them
    where that can be known without waiting for a device.

    Parameters that have a gradient on no rank get 0: finding out which would wait, too.
    """
    everyone = members.all
    device = everyone[0].parameter.device if everyone else torch.device("cpu")
    totals = torch.zeros(len(names), dtype=torch.float64, device=device)
    # What a rank had of parameters that are frozen now is in the window, and only then.
    frozen = any(not slot.parameter.requires_grad for slot in members.slots)
    wanted: dict[Slot, list[bool]] = {}
    if device.type == "cpu" or frozen:
        sets = len(members.new_marks())
        marks = [mark for slot in everyone for mark in slot.received or members.new_marks()]
        found = agree(refused, marks, [group], device)
        wanted = {slot: found[k * sets : (k + 1) * sets] for k, slot in enumerate(everyone)}
        members.thaw([slot for slot in members.frozen if any(wanted[slot])])
    elif refused is not None:
        raise refused
    memories: dict[int, Tensor] = {}
    for slot in members.slots:
        for which, buffer in enumerate(slot.buffers):
            if not slot.received[which]:
                buffer.zero_()
            slot.received[which] = slot.parameter.requires_grad or wanted[slot][which]
            if slot.received[which]:
                memory = buffer if buffer._base is None else buffer._base
                memories.setdefault(memory.data_ptr(), memory)
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
