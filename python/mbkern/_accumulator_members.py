"""Which parameters an accumulator has: those that it adds up, those frozen so far, and how both
change."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mbkern._accumulator_flush import prepare
from mbkern._accumulator_hooks import (
    put_hooks,
    release,
    require_groups_known,
    require_known,
    unhook,
)
from mbkern._accumulator_options import Options
from mbkern._accumulator_parameters import (
    Slot,
    allocate,
    check_into,
    check_parameters,
    read_parameters,
)
from mbkern._tensors import describe

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator
    from mbkern._accumulator_sharded import Shards


class Members:
    """The slots of an accumulator's parameters.

    Attributes:
        slots: of those that have required grad: with buffers and hooks.
        frozen: of those that have not so far: without buffers.
    """

    def __init__(self, owner: GradAccumulator, options: Options, shards: Shards | None) -> None:
        self.slots: list[Slot] = []
        self.frozen: list[Slot] = []
        self._owner = weakref.ref(owner)
        self._options, self._shards = options, shards
        # The modules that were given, and the numbers of their slots.
        self._modules: list[tuple[weakref.ref[torch.nn.Module], dict[int, str]]] = []
        # Lists of groups that were given: an optimizer's own, which add_param_group appends to.
        self._groups: list[list[dict[str, Any]]] = []

    @property
    def all(self) -> list[Slot]:
        """The slots of all parameters, in the order in which they were given."""
        return sorted(self.slots + self.frozen, key=lambda slot: slot.number)

    def new_marks(self) -> list[bool]:
        """Of a slot without buffers: for each set, that nothing was received."""
        return [False] * self._options.sets

    def add(self, parameters: Any, *, between_windows: bool) -> None:
        """Take more, in any of the constructor's forms; known ones are passed over.

        Between windows those that a module has replaced give place to those of their names.
        """
        options = self._options
        if isinstance(parameters, torch.nn.Module) and between_windows:
            self._retire(parameters)
        new = read_parameters(parameters, options.l1, options.l2, self.all)
        if options.noise_scale and any(slot.l1 or slot.l2 for slot in new):
            raise ValueError("mbkern: noise_scale=True does not go with penalties")
        check_parameters([slot for slot in new if slot.parameter.requires_grad], self.slots)
        if self._shards is not None:
            self._shards.check(self.all + new)
        elif any(slot.mesh is not None for slot in new):
            raise ValueError(
                "mbkern: the parameters are DTensors; give the constructor the module that "
                "fully_shard has wrapped, not its parameters"
            )
        self.frozen += new
        self.thaw((slot for slot in new if slot.parameter.requires_grad), together=True)
        if isinstance(parameters, torch.nn.Module):
            names = {id(p): name for name, p in parameters.named_parameters()}
            own = {slot.number: names[id(slot.parameter)] for slot in new}
            self._modules.append((weakref.ref(parameters), own))
        groups = isinstance(parameters, list) and any(isinstance(p, dict) for p in parameters)
        if groups and not any(known is parameters for known in self._groups):
            self._groups.append(parameters)

    def thaw(self, frozen: Iterable[Slot], *, together: bool = False) -> None:
        """Give buffers and hooks to parameters that were frozen until now.

        Over ranks they share an allocation if they come ``together`` on every rank, as in ``add``:
        those that thaw in the course of a window do so one by one, or all at once in ``flush``.
        """
        slots = list(frozen)
        if not slots:
            return
        check_parameters(slots, self.slots)
        self._allocate(slots, together=together)
        self.frozen = [slot for slot in self.frozen if slot not in slots]
        self.slots = sorted(self.slots + slots, key=lambda slot: slot.number)
        put_hooks(slots, self._owner)

    def update(self) -> None:
        """Follow the parameters: give those buffers that have come to require grad, and others to
        those that have changed, as by ``module.to(...)``.

        Sums of this window stay where they are; the gradient gets the parameter's new dtype.
        """
        changed = [slot for slot in self.slots if slot.made_for != slot.likeness]
        if changed:
            self.renew(changed)
        self.thaw(slot for slot in self.frozen if slot.parameter.requires_grad)

    def renew(self, changed: list[Slot]) -> None:
        """Give other buffers to parameters that have changed; raise for one whose sums of this
        window cannot serve it any more."""
        owner = self._owner()
        alone = owner is None or owner._group is None
        unused = [slot for slot in changed if not (slot.lent or any(slot.received))]
        for slot in changed:
            like, buffer = slot.local(), slot.buffers[0]
            serves = alone and (like.shape, like.device) == (buffer.shape, buffer.device)
            if slot not in unused and not serves:
                raise RuntimeError(
                    f"mbkern: {slot.name} is {describe(like)} now, and sums of it are in this "
                    f"window, {describe(buffer)}; change parameters between windows: reset() "
                    "drops this one"
                )
        if unused:
            check_parameters(unused, [slot for slot in self.slots if slot not in unused])
            self._allocate(unused, together=False)

    def _allocate(self, slots: list[Slot], *, together: bool) -> None:
        options, owner = self._options, self._owner()
        together |= owner is None or owner._group is None
        check_into(slots, options.dtype, options.into)
        flat = options.layout == "flat" and together
        low = options.compensation == "kahan"
        with torch.inference_mode(False):  # they may be needed after that mode
            allocate(slots, options.dtype, flat=flat, sets=options.sets, low=low)
        prepare(slots, options.into)

    def _retire(self, module: torch.nn.Module) -> None:
        """Give up parameters that the module has replaced by others of their names."""
        own: dict[int, str] = {}  # the names are the module's: here they may be told apart
        for known, names in self._modules:
            if known() is module:
                own.update(names)
        now = dict(module.named_parameters())
        there = {id(parameter) for parameter in now.values()}
        gone = [
            slot
            for slot in self.all
            if own.get(slot.number) in now and id(slot.parameter) not in there
        ]
        release(gone, self._options.into)
        unhook(gone)
        self.slots = [slot for slot in self.slots if slot not in gone]
        self.frozen = [slot for slot in self.frozen if slot not in gone]

    def require_known(self) -> None:
        """Raise if a parameter of a module, or of groups, that were given would not be counted."""
        for groups in self._groups:
            require_groups_known(groups, self.all)
        if self._shards is None:  # FSDP exchanges its parameters itself
            modules = [module() for module, _ in self._modules]
            require_known([module for module in modules if module is not None], self.all)

    def hook(self) -> None:
        """Put hooks where there are none, or none any more."""
        put_hooks(self.slots, self._owner)
        prepare(self.slots, self._options.into)  # what swap_tensors has taken away, too

    def copy_for(self, owner: GradAccumulator, memo: dict[int, Any]) -> Members:
        """A copy of parameters, buffers and modules, as far as those were copied, with hooks."""
        other = Members(owner, self._options, self._shards)
        other.slots = copy.deepcopy(self.slots, memo)
        other.frozen = copy.deepcopy(self.frozen, memo)
        # The module may be copied later in the same deepcopy, which then finds this copy.
        copies = [(copy.deepcopy(module(), memo), dict(names)) for module, names in self._modules]
        other._modules = [
            (weakref.ref(module), names)
            for module, names in copies
            if isinstance(module, torch.nn.Module)
        ]
        other._groups = copy.deepcopy(self._groups, memo)
        prepare(other.slots, self._options.into)
        other.hook()
        return other
