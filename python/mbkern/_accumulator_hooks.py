"""The hooks by which gradients reach an accumulator, and what lies in ``.grad`` meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbkern._accumulator_parameters import Given, Slot
from mbkern._tensors import describe

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator


class _Hook:
    """Hands a gradient to the accumulator of the parameter, while that collects.

    It owns neither, so a model may outlive its accumulator; copies and pickles of parameters leave
    hooks out.
    """

    def __init__(self, accumulator: weakref.ref[GradAccumulator], slot: Slot) -> None:
        self._accumulator, self._slot = accumulator, weakref.ref(slot)
        self.handle: Any = None

    def __call__(self, parameter: Tensor) -> None:
        accumulator, slot = self._accumulator(), self._slot()
        if accumulator is None or slot is None:
            self.handle.remove()
        elif slot.parameter is not parameter:
            return  # which swap_tensors has given what was the slot's, hooks and all
        elif accumulator._collector is not None:
            accumulator._collector.take(slot)
        else:
            slot.stray = True  # compiled autograd traces this


def put_hooks(slots: list[Slot], accumulator: weakref.ref[GradAccumulator]) -> None:
    """Put a hook on every parameter that requires grad and has none, or none any more."""
    for slot in slots:
        parameter = slot.parameter
        swapped = _was_swapped(slot)
        if swapped:
            unhook([slot])
        if slot.handle is None and parameter.requires_grad:
            register = parameter.register_post_accumulate_grad_hook
            hook = _Hook(accumulator, slot)
            slot.handle = hook.handle = register(hook)  # type: ignore[no-untyped-call]
            slot.hooked = parameter._cdata
            if swapped:
                # torch still has the dict of hooks by the parameter's name, but calls it no more.
                hooks = parameter._post_accumulate_grad_hooks
                parameter._post_accumulate_grad_hooks = hooks


def _was_swapped(slot: Slot) -> bool:
    """Whether ``torch.utils.swap_tensors`` has put another tensor under the parameter's name since
    it got its hook, which went away with the old one; as ``module.to(...)`` does after
    ``torch.__future__.set_swap_module_params_on_conversion(True)``."""
    return slot.handle is not None and slot.hooked != slot.parameter._cdata


def unhook(slots: list[Slot]) -> None:
    """Take the hooks off again."""
    for slot in slots:
        if slot.handle is not None:
            slot.handle.remove()
            slot.handle = None


def set_gradient(slot: Slot, grad: Tensor | None, into: str) -> None:
    """Put a gradient where the optimizer looks for it."""
    whole = None if grad is None else slot.like_parameter(grad)
    if into == "main_grad":
        slot.parameter.main_grad = whole  # type: ignore[attr-defined]
    else:
        slot.parameter.grad = whole
    slot.given = None if grad is None else Given(grad)
    slot.stray = False


def _is_given(slot: Slot, grad: Tensor | None) -> bool:
    """Whether a gradient is the one that was handed out."""
    return slot.given is not None and grad is not None and slot.given.is_(slot.local(grad))


def release(slots: list[Slot], into: str) -> None:
    """Take back what was handed out: it may lie in a buffer, and autograd would add to it."""
    names = ("grad", "main_grad") if into == "main_grad" else ("grad",)  # the one may be the other
    for slot in slots:
        for name in names:
            if _is_given(slot, getattr(slot.parameter, name, None)):
                setattr(slot.parameter, name, None)
        slot.given = None


def require_no_gradients(slots: list[Slot]) -> None:
    """Raise if a parameter has a gradient that was not handed out here: it would be counted."""
    for slot in slots:
        grad = slot.parameter.grad
        if grad is None:
            slot.stray = False
            continue
        own = _is_given(slot, grad)
        if not own or slot.stray:
            raise RuntimeError(
                f"mbkern: {slot.name} has a gradient that is not this accumulator's"
                f"{', added to the one that flush() left' if own else ''}; clear it "
                "(optimizer.zero_grad(set_to_none=True)) before a micro-batch, or it would be "
                f"{'lost' if own else 'counted'}"
            )


def require_none_stray(slots: list[Slot], into: str) -> None:
    """Raise if a backward outside a micro-batch has left a gradient that would be overwritten."""
    for slot in slots:
        grad = slot.parameter.grad
        if grad is None or into == "main_grad":
            continue
        # Unfrozen, or swapped, since.
        unseen = (slot.handle is None and slot.parameter.requires_grad) or _was_swapped(slot)
        if (slot.stray and not _is_anothers(slot, grad)) or (unseen and not _is_given(slot, grad)):
            raise RuntimeError(
                f"mbkern: {slot.name} has a gradient of a backward outside a micro-batch, which "
                "would be overwritten; run it in micro_batch(), or clear it first "
                "(optimizer.zero_grad(set_to_none=True))"
            )


def _is_anothers(slot: Slot, grad: Tensor) -> bool:
    """Whether another accumulator has handed out the gradient, and nothing was added to it: what it
    collected was seen here, too."""
    return any(_is_given(other, grad) and not stray for other, stray in strays_of(slot.parameter))


def strays_of(parameter: Tensor) -> list[tuple[Slot, bool]]:
    """What accumulators have of a parameter, and whether a backward outside has given it a
    gradient."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    slots = [hook._slot() for hook in hooks.values() if isinstance(hook, _Hook)]
    return [(slot, slot.stray) for slot in slots if slot is not None]


def require_known(modules: list[torch.nn.Module], slots: list[Slot]) -> None:
    """Raise if a module that was given has a parameter to be trained that has no slot."""
    own = {id(slot.parameter) for slot in slots}
    for module in modules:
        missing = [
            name
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and id(parameter) not in own
        ]
        if missing:
            raise RuntimeError(
                "mbkern: the module has parameters that this accumulator does not know: "
                f"{_some(missing)}; they were "
                "replaced (as by load_state_dict(assign=True)) or added since, and their gradients "
                "would not be counted: call add(module)"
            )


def require_groups_known(groups: list[dict[str, Any]], slots: list[Slot]) -> None:
    """Raise if groups that were given have a parameter to be trained that has no slot."""
    own = {id(slot.parameter) for slot in slots}
    missing = [
        f"{describe(parameter)} in group {number}"
        for number, parameter in _of_groups(groups)
        if parameter.requires_grad and id(parameter) not in own
    ]
    if missing:
        raise RuntimeError(
            "mbkern: the parameter groups have parameters that this accumulator does not know: "
            f"{_some(missing)}; they were added since (as by add_param_group), and their gradients "
            "would not be counted: call add(optimizer.param_groups)"
        )


def require_none_unknown(optimizers: Iterable[Any], slots: list[Slot]) -> None:
    """Raise if optimizers would step parameters by gradients that no accumulator has normalised."""
    own = {id(slot.parameter) for slot in slots}
    unknown = [
        f"{describe(parameter)} in group {number}"
        for optimizer in optimizers
        for number, parameter in _of_groups(optimizer.param_groups)
        if id(parameter) not in own and parameter.grad is not None
        if not any(_is_given(slot, parameter.grad) for slot, _ in strays_of(parameter))
    ]
    if unknown:
        raise RuntimeError(
            "mbkern: the optimizer has parameters with gradients that this accumulator does not "
            f"know, plain sums: {_some(unknown)}; call add(optimizer.param_groups) before a window "
            "to accumulate them, too, or clear the gradients (zero_grad(set_to_none=True))"
        )


def _of_groups(groups: list[dict[str, Any]]) -> Iterator[tuple[int, Tensor]]:
    for number, group in enumerate(groups):
        params = group["params"]
        for item in [params] if isinstance(params, Tensor) else params:
            yield number, item[1] if isinstance(item, tuple) else item


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def require_none_left(slots: list[Slot]) -> None:
    """Raise if a micro-batch has left gradients that no hook has seen."""
    for slot in slots:
        if slot.parameter.grad is not None:
            slot.hooked = 0  # to be hooked again: two swaps may have gone unseen
            raise RuntimeError(
                f"mbkern: {slot.name} was given a gradient in this micro-batch that no hook saw: "
                ".grad was assigned, requires_grad set, or the parameter swapped, inside the "
                "block, or DistributedDataParallel averaged it: run such a model under `no_sync()`"
            )


def discard(slots: list[Slot]) -> None:
    """Drop the gradients of a backward that failed."""
    for slot in slots:
        slot.parameter.grad = None
