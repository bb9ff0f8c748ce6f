"""The one place that knows the inside of torch.amp.GradScaler.

``flush`` divides the loss scale out. Then ``scaler.step(optimizer)`` must not do so again, but must
still skip the step after an overflow and shrink the scale. It decides by a record for each
optimizer: a stage (an ``OptState``), and for each device a tensor that is 1 after an overflow.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mbkern._accumulator_parameters import Slot
from mbkern._arguments import Number
from mbkern._tensors import describe

# Versions whose GradScaler keeps this record: tests/test_accumulator_scaler.py, `make torches`.
OLDEST, NEWEST = (2, 6), (2, 14)


def _version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def optimizers_of(optimizer: Any) -> list[Any]:
    """One optimizer or several."""
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def _require(scaler: Any, optimizer: Any, slots: list[Slot]) -> None:
    if not OLDEST <= _version() <= NEWEST:
        raise NotImplementedError(
            f"mbkern: flush(scaler=...) is tested with torch {OLDEST} to {NEWEST}, this is "
            f"{torch.__version__}; call scaler.unscale_(optimizer) after flush() instead"
        )
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"mbkern: scaler must be a torch.amp.GradScaler, not {type(scaler)}")
    if optimizer is None:
        raise ValueError("mbkern: flush(scaler=...) needs optimizer=, the one of scaler.step()")
    own = {id(slot.parameter) for slot in slots}
    stepped: set[int] = set()
    for each in optimizers_of(optimizer):
        for group in each.param_groups:
            for parameter in group["params"]:
                stepped.add(id(parameter))
                if id(parameter) not in own and parameter.grad is not None:
                    raise ValueError(
                        f"mbkern: the optimizer has a parameter, {describe(parameter)}, with a "
                        "gradient that is not this accumulator's: scaler.step() would not unscale "
                        "it; accumulate it, too"
                    )
    for slot in slots:
        if any(slot.received) and id(slot.parameter) not in stepped:
            raise ValueError(
                f"mbkern: {slot.name} is of none of the optimizers given; scaler.step() of its own "
                "would unscale it again: pass optimizer=[...], all that step these parameters"
            )


def scale_of(scaler: Any, optimizer: Any, slots: list[Slot], micro_batches: int) -> Number:
    """The factor in the accumulated gradients; a tensor on the scaler's device."""
    _require(scaler, optimizer, slots)
    if not scaler.is_enabled():
        return 1.0
    for each in optimizers_of(optimizer):
        stage = _state(scaler, each)["stage"]
        if stage.name != "READY":
            raise RuntimeError(
                f"mbkern: the scaler has {stage.name.lower()} this optimizer since its last "
                "update(); flush(scaler=...) unscales, so neither unscale_() nor step() may come "
                "before it"
            )
    if scaler._scale is None and micro_batches:
        raise RuntimeError("mbkern: the scaler has scaled no loss: use scaler.scale(loss)")
    if scaler._scale is None:  # a rank without a micro-batch
        device = slots[0].parameter.device if slots else torch.device("cpu")
        scaler._lazy_init_scale_growth_tracker(device)
    scale: Tensor = scaler._scale
    return scale.detach().clone()


def record(scaler: Any, optimizer: Any, found_inf: Tensor) -> None:
    """Tell the scaler that its scale is divided out, and whether there was an overflow."""
    if not scaler.is_enabled():
        return
    for each in optimizers_of(optimizer):
        state = _state(scaler, each)
        state["found_inf_per_device"] = {found_inf.device: found_inf.detach().clone()}
        state["stage"] = type(state["stage"]).UNSCALED


def _state(scaler: Any, optimizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    if set(state) != {"stage", "found_inf_per_device"}:
        raise NotImplementedError(f"mbkern: unknown state of a GradScaler: {sorted(state)}")
    return state
