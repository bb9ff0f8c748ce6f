"""Windows of FSDP2 modules (``fully_shard``): sums of the shards that this rank has.

FSDP reduces gradients itself, in every backward, or with ``set_requires_gradient_sync(False)``
keeps them whole until the last one; each shard's gradient then comes as it is reduced. It is a mean
over ranks, which is undone at the end. Over ranks go counts, and the squares of the norms.
"""

from __future__ import annotations

from typing import Any

import torch

from mbkern._accumulator_counts import Count
from mbkern._accumulator_parameters import Slot
from mbkern._flush import FlushStats


def find_shards(module: Any) -> Shards | None:
    """The FSDP modules in a module, or None."""
    if not isinstance(module, torch.nn.Module) or not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FSDPModule

    found = [m for m in module.modules() if isinstance(m, FSDPModule)]
    return Shards(found) if found else None


class Shards:
    """What an accumulator knows of the FSDP modules whose parameters it has."""

    def __init__(self, modules: list[Any]) -> None:
        self._modules = modules

    def check(self, slots: list[Slot]) -> None:
        """Raise if these are not all shards over one mesh."""
        meshes = []
        for slot in slots:
            mesh, placements = slot.mesh, slot.placements
            if mesh is None:
                raise ValueError(
                    f"mbkern: {slot.name} is not sharded, and other parameters are: wrap the whole "
                    "module by fully_shard, or accumulate them apart"
                )
            kinds = [p.is_shard() for p in placements]
            if sum(kinds) != 1 or any(
                not (p.is_shard() or p.is_replicate()) or type(p).__name__ == "_StridedShard"
                for p in placements
            ):
                raise NotImplementedError(
                    f"mbkern: {slot.name} is placed {placements}; supported are shards over one "
                    "mesh dimension, alone (FSDP) or with replicas (HSDP)"
                )
            meshes.append(mesh)
        if any(mesh != meshes[0] for mesh in meshes):
            raise ValueError("mbkern: the parameters are sharded over different meshes")

    def _groups(self) -> list[Any]:
        return [
            group
            for module in self._modules
            for group in _param_groups(module)
        ]  # fmt: skip

    def require_reduced(self) -> None:
        """Raise if FSDP still holds gradients that have not been reduced."""
        for group in self._groups():
            for parameter in group.fsdp_params:
                if _kept_whole(parameter):
                    raise RuntimeError(
                        "mbkern: FSDP still holds gradients of this window that were not reduced: "
                        "set_requires_gradient_sync(True) before the last micro-batch's forward"
                    )

    def drop(self) -> None:
        """Let FSDP forget gradients that have not been reduced."""
        for group in self._groups():
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if _kept_whole(parameter):
                    parameter._unsharded_param.grad = None

    def divisor(self, slots: list[Slot]) -> float:
        """What FSDP has divided the sums over ranks by."""
        found = {group.gradient_divide_factor for group in self._groups()}
        if len(found) > 1:
            raise ValueError(f"mbkern: FSDP modules divide by different factors: {sorted(found)}")
        (factor,) = found or {None}
        if factor is not None:
            return float(factor)
        mesh = slots[0].mesh
        return float(mesh.size())

    def reduce_counts(
        self, slots: list[Slot], counts: dict[str, Count], names: tuple[str, ...]
    ) -> None:
        """Make the counts those of all ranks."""
        mesh = slots[0].mesh
        totals = torch.zeros(len(names), dtype=torch.float64, device=slots[0].local().device)
        for k, name in enumerate(names):
            totals[k] = counts.get(name, Count()).total()
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(totals, group=mesh.get_group(dim))
        for k, name in enumerate(names):
            counts[name] = Count()
            counts[name].add(totals[k])

    def whole(self, slots: list[Slot], stats: FlushStats) -> FlushStats:
        """Statistics of whole parameters, from those of their shards; not clipped yet."""
        slot = slots[0]
        at = next(k for k, p in enumerate(slot.placements) if p.is_shard())
        sums = torch.cat((stats.squared_norms, stats.penalty.reshape(1)))
        over = stats.found_inf.clone()
        group = slot.mesh.get_group(at)
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(over, op=torch.distributed.ReduceOp.MAX, group=group)
        norm = sums[:-1].sum().sqrt()
        return stats._replace(norm=norm, squared_norms=sums[:-1], penalty=sums[-1], found_inf=over)


def _kept_whole(parameter: Any) -> bool:
    """Whether FSDP keeps a whole gradient, in its ``reduce_dtype``, or as it came."""
    unsharded = getattr(parameter, "_unsharded_param", None)
    came = unsharded is not None and unsharded.grad is not None
    return came or parameter.unsharded_accumulated_grad is not None


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
