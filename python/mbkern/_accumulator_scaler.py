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

from mbkern._arguments import Number

# Versions whose GradScaler keeps this record: tests/test_grad_accumulator.py under `make torches`.
OLDEST, NEWEST = (2, 6), (2, 14)


def _version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _require(scaler: Any, optimizer: Any) -> None:
    if not OLDEST <= _version() <= NEWEST:
        raise NotImplementedError(
            f"mbkern: flush(scaler=...) is tested with torch {OLDEST} to {NEWEST}, this is "
            f"{torch.__version__}; call scaler.unscale_(optimizer) after flush() instead"
        )
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"mbkern: scaler must be a torch.amp.GradScaler, not {type(scaler)}")
    if optimizer is None:
        raise ValueError("mbkern: flush(scaler=...) needs optimizer=, the one of scaler.step()")


def scale_of(scaler: Any, optimizer: Any) -> Number:
    """The factor in the accumulated gradients; a tensor on the scaler's device."""
    _require(scaler, optimizer)
    if not scaler.is_enabled():
        return 1.0
    stage = _state(scaler, optimizer)["stage"]
    if stage.name != "READY":
        raise RuntimeError(
            f"mbkern: the scaler has {stage.name.lower()} this optimizer since its last update(); "
            "flush(scaler=...) unscales, so neither unscale_() nor step() may come before it"
        )
    scale: Tensor | None = scaler._scale
    if scale is None:
        raise RuntimeError("mbkern: the scaler has scaled no loss: use scaler.scale(loss)")
    return scale.detach().clone()


def record(scaler: Any, optimizer: Any, found_inf: Tensor) -> None:
    """Tell the scaler that its scale is divided out, and whether there was an overflow."""
    if not scaler.is_enabled():
        return
    state = _state(scaler, optimizer)
    state["found_inf_per_device"] = {found_inf.device: found_inf.detach().clone()}
    state["stage"] = type(state["stage"]).UNSCALED


def _state(scaler: Any, optimizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    if set(state) != {"stage", "found_inf_per_device"}:
        raise NotImplementedError(f"mbkern: unknown state of a GradScaler: {sorted(state)}")
    return state
