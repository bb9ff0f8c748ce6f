"""The parameters of an accumulator, and where the sums of each lie."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mbkern._losses import as_number
from mbkern._tensors import describe, is_dtensor

_ALIGNMENT = 64  # bytes
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Given:
    """A gradient that was handed out, recognised without keeping its memory alive."""

    def __init__(self, grad: Tensor) -> None:
        self._storage = StorageWeakRef(grad.untyped_storage())  # type: ignore[no-untyped-call]
        self._at = grad.data_ptr()

    def is_(self, grad: Tensor) -> bool:
        """Whether ``grad`` lies in the same memory."""
        return (
            grad.layout is torch.strided
            and grad.untyped_storage()._cdata == self._storage.cdata
            and grad.data_ptr() == self._at
        )


@dataclass(eq=False)
class Slot:
    """A parameter and what is kept for it: nothing, as long as it has not required grad.

    Attributes:
        parameter: the tensor whose gradients are added up.
        name: for messages.
        l1, l2: its penalties.
        number: its place among all: norms are summed in this order.
        made_for: what the parameter was like when it got its buffers.
        buffers: its sums, one for each set of buffers.
        low: of each buffer, what it cannot hold; None where nothing is kept.
        additions: how many gradients were added so far, where chance depends on it.
        received: for each set, whether its buffer holds sums of this window; else its contents mean
            nothing, and the first gradient overwrites them.
        handle: of its hook; None while it does not require grad.
        hooked: which of torch's own tensors has the hook: the parameter's at the time.
        given: the memory of the gradient that was last handed out.
        lent: whether ``GradAccumulator.buffer`` has handed its buffer out in this window.
        stray: whether a backward outside a micro-batch has given it a gradient since.
    """

    parameter: Tensor
    name: str
    l1: float
    l2: float
    number: int = 0
    made_for: tuple[Any, ...] | None = None
    buffers: list[Tensor] = field(default_factory=list)
    low: list[Tensor | None] = field(default_factory=list)
    additions: int = 0
    received: list[bool] = field(default_factory=list)
    handle: Any = None
    hooked: int = 0
    given: Given | None = None
    stray: bool = False
    lent: bool = False

    @property
    def mesh(self) -> Any:
        """The device mesh of a DTensor; None of a plain parameter."""
        return getattr(self.parameter, "device_mesh", None)

    @property
    def likeness(self) -> tuple[Any, ...]:
        """What of the parameter its buffers depend on; ``module.to(...)`` changes it in place."""
        p = self.parameter
        return p.dtype, p.device, p.shape, p.stride()

    @property
    def placements(self) -> tuple[Any, ...]:
        """How a DTensor lies on its mesh."""
        return tuple(getattr(self.parameter, "placements", ()))

    def local(self, tensor: Tensor | None = None) -> Tensor:
        """What of the parameter, or of a tensor like it, is in this process."""
        tensor = self.parameter.detach() if tensor is None else tensor
        found: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
        return found

    def like_parameter(self, local: Tensor) -> Tensor:
        """A local tensor as one of the parameter's kind."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.parameter.shape,
            stride=self.parameter.stride(),
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hook yet: hooks stay with the parameter."""
        return {**self.__dict__, "handle": None, "given": None, "lent": False}


def read_parameters(given: Any, l1: float, l2: float, known: Iterable[Slot] = ()) -> list[Slot]:
    """Slots for a module, parameters, (name, parameter) pairs or groups; one for each parameter.

    A group is a dict with ``params`` and perhaps ``l1`` and ``l2`` of its own. Names are told
    apart: state and statistics go by them.
    """
    known = list(known)
    slots: list[Slot] = []
    names = {slot.name for slot in known}
    first = 1 + max((slot.number for slot in known), default=-1)
    seen = {id(slot.parameter) for slot in known}
    for tensors, group_l1, group_l2 in _groups(given, l1, l2):
        for item in tensors:
            if isinstance(item, tuple) and not (len(item) == 2 and isinstance(item[0], str)):
                raise TypeError(
                    "mbkern: a tuple among parameters is a pair of a name and a tensor, not of "
                    f"{', '.join(type(part).__name__ for part in item)}"
                )
            name, tensor = item if isinstance(item, tuple) else (None, item)
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"mbkern: a parameter must be a tensor, not {type(tensor).__name__}"
                )
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = _unused(name or f"parameter {len(seen) - 1}", names)
            names.add(name)
            slots.append(Slot(tensor, name, group_l1, group_l2, first + len(slots)))
    return slots


def check_parameters(slots: Iterable[Slot], known: Iterable[Slot] = ()) -> None:
    """Raise for parameters whose gradients cannot be added up, or not beside the known ones."""
    first = next(iter(known), None)
    for slot in slots:
        first = first or slot
        _check(slot.parameter, slot.name)
        if slot.parameter.device != first.parameter.device:
            raise ValueError(
                f"mbkern: {slot.name} is on {slot.parameter.device}, {first.name} on "
                f"{first.parameter.device}; one accumulator serves one device"
            )


def check_into(slots: Iterable[Slot], dtype: torch.dtype, into: str) -> None:
    """Raise for parameters whose dtype ``flush`` cannot write from such buffers."""
    for slot in slots:
        if into == "grad" and dtype == torch.float64 and slot.parameter.element_size() < 4:
            raise TypeError(
                f"mbkern: {slot.name} is {describe(slot.parameter)}: buffers of float64 give "
                'float64 and float32 gradients; use dtype=torch.float32, or into="main_grad"'
            )


def _unused(name: str, names: set[str]) -> str:
    number, found = 1, name
    while found in names:
        number += 1
        found = f"{name} ({number})"
    return found


def penalty(value: Any, name: str) -> float:
    """A penalty's factor."""
    number = as_number(value, name)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"mbkern: {name} is {number}; it must be finite and at least 0")
    return number


def _groups(given: Any, l1: float, l2: float) -> Iterable[tuple[Any, float, float]]:
    if isinstance(given, torch.nn.Module):
        return [(list(given.named_parameters()), l1, l2)]
    if isinstance(given, Tensor):
        return [([given], l1, l2)]
    items = _listed(given, "parameters")
    if not any(isinstance(item, dict) for item in items):
        return [(items, l1, l2)]
    found = []
    for group in items:
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError('mbkern: groups are dicts with "params"; all of them or none')
        tensors = group["params"]
        tensors = [tensors] if isinstance(tensors, Tensor) else _listed(tensors, '"params"')
        of_group = penalty(group.get("l1", l1), "l1"), penalty(group.get("l2", l2), "l2")
        found.append((tensors, *of_group))
    return found


def _listed(given: Any, name: str) -> list[Any]:
    try:
        if isinstance(given, (str, bytes, set, frozenset)):  # a set's order is not one
            raise TypeError
        items = iter(given)
    except TypeError:  # also of what has the method, as an array without a dimension
        raise TypeError(
            f"mbkern: {name} must be a module, tensors, pairs of a name and a tensor, or dicts, "
            f"not {type(given).__name__}"
        ) from None
    return list(items)


def _check(tensor: Tensor, name: str) -> None:
    if tensor.is_complex():
        raise TypeError(
            f"mbkern: {name} is {tensor.dtype}; complex parameters are not supported: keep the "
            "real view (torch.view_as_real) as the parameter"
        )
    if type(tensor) not in (Tensor, torch.nn.Parameter) and not is_dtensor(tensor):
        raise TypeError(f"mbkern: {name} is a {type(tensor).__name__}; only plain parameters")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(f"mbkern: {name} is {describe(tensor)}; only dense parameters with memory")
    if tensor.dim() > 8:
        raise ValueError(f"mbkern: {name} has {tensor.dim()} dimensions; at most 8 are supported")
    if tensor.dtype not in _TYPES:
        raise TypeError(f"mbkern: {name} is {describe(tensor)}; it must be a floating parameter")
    if not tensor.is_leaf:
        raise ValueError(f"mbkern: {name} is {describe(tensor)}, and no leaf: it has no gradient")


def allocate(slots: list[Slot], dtype: torch.dtype, *, flat: bool, sets: int, low: bool) -> None:
    """Give each slot its buffers, with the parameter's strides; their contents mean nothing yet.

    Flat: one allocation for each dtype and set. low: what bfloat16 buffers cannot hold is kept.
    """
    members_of: dict[torch.dtype, list[Slot]] = {}
    for slot in slots:
        wide = torch.float64 if slot.parameter.dtype == torch.float64 else dtype
        members_of.setdefault(wide, []).append(slot)
        slot.buffers, slot.low, slot.received = [], [], [False] * sets
        slot.made_for = slot.likeness
    for wide, members in members_of.items():
        for _ in range(sets):
            kept = low and wide == torch.bfloat16
            buffers = _like_parameters(members, wide, flat)
            lows = _like_parameters(members, wide, flat) if kept else [None] * len(members)
            for slot, buffer, low_part in zip(members, buffers, lows, strict=True):
                slot.buffers.append(buffer)
                slot.low.append(low_part)


def lies_like(buffer: Tensor, parameter: Tensor) -> bool:
    """Whether a buffer has the strides that a gradient of the parameter should have: optimizers
    with ``fused=True`` take the two for alike, without looking."""
    strides = buffer.stride()
    if strides == parameter.stride():
        return True
    return strides == torch.empty_like(parameter, device="meta").stride()


def _like_parameters(slots: list[Slot], dtype: torch.dtype, flat: bool) -> list[Tensor]:
    """A tensor for each, with its strides; in one allocation if that is asked for."""
    locals_ = [slot.local() for slot in slots]
    if not flat:
        return [torch.empty_like(like, dtype=dtype) for like in locals_]
    unit = _ALIGNMENT // torch.empty((), dtype=dtype, device="meta").element_size()
    sizes = [-(-like.numel() // unit) * unit for like in locals_]
    memory = torch.empty(sum(sizes), dtype=dtype, device=locals_[0].device)
    found, at = [], 0
    for like, size in zip(locals_, sizes, strict=True):
        strides = torch.empty_like(like, device="meta").stride()
        found.append(memory.as_strided(like.shape, strides, at))
        at += size
    return found
