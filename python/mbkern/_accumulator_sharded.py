"""Windows of FSDP2 modules (``fully_shard``): sums of the shards that this rank has.

FSDP reduces gradients itself, in every backward: each shard's gradient comes as it is reduced, a
mean over ranks, which is undone at the end. With ``set_requires_gradient_sync(False)`` it keeps
them whole, and no hook fires: what it has kept by the end of the window is reduced then, by one
reduce-scatter in the buffers' type. Over ranks go counts, and the squares of the norms.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from mbkern._accumulate import accumulate_
from mbkern._accumulator_counts import Count
from mbkern._accumulator_parameters import Slot
from mbkern._accumulator_ranks import agree
from mbkern._arguments import Number
from mbkern._flush import FlushStats

#: For every parameter and group, which memory is kept and its version; empty: nothing yet.
Kept = tuple[tuple[int, int] | None, ...]


def find_shards(module: Any) -> Shards | None:
    """The FSDP modules in a module, or None."""
    # Where nobody has imported it, no module is one. Our import would take 0.4 s, and keep gloo's
    # threads: torch.distributed.nn, which it brings, has the process group in default arguments.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, torch.nn.Module):
        return None
    found = [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]
    return Shards(found) if found else None


class Shards:
    """What an accumulator knows of the FSDP modules whose parameters it has."""

    def __init__(self, modules: list[Any]) -> None:
        self._modules = modules
        self._slots: list[Slot] = []  # all that there are, frozen ones too

    @property
    def group(self) -> Any:
        """The ranks that have different shards."""
        return self._slots[0].mesh.get_group(_shard_dim(self._slots[0]))

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
        self._slots = list(slots)

    def _groups(self) -> list[Any]:
        return [
            group
            for module in self._modules
            for group in _param_groups(module)
        ]  # fmt: skip

    def kept(self) -> Kept:
        """What FSDP keeps of gradients: another value after every backward that adds to it."""
        tensors = [
            tensor
            for group in self._groups()
            for tensor in (*map(_kept, group.fsdp_params), _partly_reduced(group))
        ]
        return tuple(None if t is None else (t.data_ptr(), t._version) for t in tensors)

    def require_own(self, kept: Kept) -> None:
        """Raise if FSDP keeps anything but that, which the window's micro-batches have left."""
        if self.kept() != (kept or (None,) * len(self.kept())):
            raise RuntimeError(
                "mbkern: FSDP keeps gradients of a backward outside the micro-batches of this "
                "window, and would add them to it; reset() drops them, and the window"
            )

    def require_all_reduced(self) -> None:
        """Raise if sums over shards still wait for those over replicas."""
        if any(_partly_reduced(group) is not None for group in self._groups()):
            raise RuntimeError(
                "mbkern: FSDP keeps sums of this window that were not added up over replicas: "
                "set_requires_all_reduce(True) before the last micro-batch's forward"
            )

    def require_apart(self, names: tuple[str, ...]) -> None:
        """Raise if FSDP adds up gradients of losses that are divided by different counts."""
        if len(names) > 1 and self.keep_any():
            raise RuntimeError(
                f"mbkern: FSDP keeps the gradients of this micro-batch, and would add those of "
                f"other denominators to them; with {sorted(names)} every micro-batch must be "
                "reduced: set_requires_gradient_sync(True)"
            )

    def keep_any(self) -> bool:
        """Whether FSDP keeps a gradient of this window that was not reduced."""
        return any(_kept(p) is not None for g in self._groups() for p in g.fsdp_params)

    def reduce_kept(self, alpha: Number) -> None:
        """Add the gradients that FSDP has kept whole to the sums, as a reduced one would be.

        One reduce-scatter for each of FSDP's groups of parameters, in the buffers' type. A rank
        takes part in it if it keeps a gradient of the group; those that it lacks are zeros.
        """
        slot_of = {id(slot.parameter): slot for slot in self._slots}
        for group in self._groups():
            if all(_kept(p) is None for p in group.fsdp_params):
                continue
            parameters = [
                p for p in group.fsdp_params
                if p.sharded_param.requires_grad or _kept(p) is not None
            ]  # fmt: skip
            missing = [p for p in parameters if id(p.sharded_param) not in slot_of]
            if missing:
                raise RuntimeError(
                    "mbkern: FSDP keeps the gradient of a parameter that this accumulator does not "
                    f"have, of shape {tuple(missing[0]._orig_size)}; add() it"
                )
            members = [slot_of[id(p.sharded_param)] for p in parameters]
            with torch.no_grad():
                shards = _reduced(parameters, members)
            _drop(parameters)
            for received in (False, True):
                some = [k for k, slot in enumerate(members) if slot.received[0] == received]
                accumulate_(
                    [members[k].buffers[0] for k in some], [shards[k] for k in some],
                    alpha / self.divisor(), 1.0 if received else 0.0,
                )  # fmt: skip
            for slot in members:
                slot.received[0] = True

    def drop(self) -> None:
        """Let FSDP forget gradients that have not been reduced."""
        for group in self._groups():
            _drop(group.fsdp_params)
            if _partly_reduced(group) is not None:
                group._partial_reduce_output = None

    def agree(self, refused: Exception | None) -> None:
        """Raise what a rank has refused; on every rank, where no device has to be waited for."""
        mesh, device = self._slots[0].mesh, self._slots[0].local().device
        if device.type == "cpu":
            agree(refused, [], [mesh.get_group(dim) for dim in range(mesh.ndim)], device)
        elif refused is not None:
            raise refused

    def divisor(self) -> float:
        """What FSDP divides the sums over ranks by."""
        ranks = float(self._slots[0].mesh.size())
        factors = [group.gradient_divide_factor for group in self._groups()]
        found = {ranks if factor is None else float(factor) for factor in factors} or {ranks}
        if len(found) > 1:
            raise ValueError(
                f"mbkern: FSDP modules divide by different factors: {sorted(found)}; "
                "set_gradient_divide_factor sets that of the module it is called on only"
            )
        (factor,) = found
        return factor

    def reduce_counts(self, counts: dict[str, Count], names: tuple[str, ...]) -> None:
        """Make the counts those of all ranks."""
        mesh, device = self._slots[0].mesh, self._slots[0].local().device
        totals = torch.zeros(len(names), dtype=torch.float64, device=device)
        for k, name in enumerate(names):
            totals[k] = counts.get(name, Count()).total()
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(totals, group=mesh.get_group(dim))
        for k, name in enumerate(names):
            counts[name] = Count()
            counts[name].add(totals[k])

    def largest(self, found_inf: Tensor) -> Tensor:
        """Whether a gradient is not finite in any shard: all ranks must take or skip a step."""
        over = found_inf.clone()
        torch.distributed.all_reduce(over, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return over

    def whole(self, stats: FlushStats) -> FlushStats:
        """Statistics of whole parameters, from those of their shards; not clipped yet."""
        sums = torch.cat((stats.squared_norms, stats.penalty.reshape(1)))
        torch.distributed.all_reduce(sums, group=self.group)
        over = self.largest(stats.found_inf)
        norm = sums[:-1].sum().sqrt()
        return stats._replace(norm=norm, squared_norms=sums[:-1], penalty=sums[-1], found_inf=over)


# The newer name, where there is one: the older warns then.
_scatter: Any = getattr(
    torch.distributed, "reduce_scatter_single", torch.distributed.reduce_scatter_tensor
)


def _kept(parameter: Any) -> Tensor | None:
    """The whole gradient that FSDP keeps: in its ``reduce_dtype``, or as it came."""
    unsharded = getattr(parameter, "_unsharded_param", None)
    summed: Tensor | None = parameter.unsharded_accumulated_grad
    return unsharded.grad if summed is None and unsharded is not None else summed


def _partly_reduced(group: Any) -> Tensor | None:
    """What ``set_requires_all_reduce(False)`` has left: reduced over shards, not over replicas."""
    found: Tensor | None = getattr(group, "_partial_reduce_output", None)
    return found


def _drop(parameters: list[Any]) -> None:
    for parameter in parameters:
        parameter.unsharded_accumulated_grad = None
        if _kept(parameter) is not None:
            parameter._unsharded_param.grad = None


def _reduced(parameters: list[Any], slots: list[Slot]) -> list[Tensor]:
    """This rank's shards of the sums over ranks of whole gradients."""
    mesh, first = slots[0].mesh, slots[0].buffers[0]
    at = _shard_dim(slots[0])
    world = mesh.size(at)
    sizes = [p.padded_sharded_param_size.numel() for p in parameters]
    parts = torch.zeros(world, sum(sizes), dtype=first.dtype, device=first.device)
    for parameter, part in zip(parameters, torch.split(parts, sizes, 1), strict=True):
        grad, padded = _kept(parameter), parameter.padded_sharded_param_size
        if grad is None:
            continue
        dim = parameter.fsdp_placement.dim
        for rank, piece in enumerate(torch.split(grad, max(padded[dim], 1), dim)):
            part[rank].view(padded).narrow(dim, 0, piece.size(dim)).copy_(piece)
    summed = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
    _scatter(summed, parts.view(-1), group=mesh.get_group(at))
    for other in range(mesh.ndim):
        if other != at:
            torch.distributed.all_reduce(summed, group=mesh.get_group(other))
    shards = []
    for parameter, slot, flat in zip(parameters, slots, torch.split(summed, sizes), strict=True):
        dim = parameter.fsdp_placement.dim
        whole = flat.view(parameter.padded_sharded_param_size)
        shards.append(whole.narrow(dim, 0, slot.buffers[0].size(dim)))
    return shards


def _shard_dim(slot: Slot) -> int:
    """The dimension of the mesh over which the slot's parameter is sharded."""
    return next(k for k, p in enumerate(slot.placements) if p.is_shard())


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
