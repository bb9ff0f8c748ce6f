"""Saving an accumulator in the middle of a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbkern._accumulator_collect import Measurement
from mbkern._accumulator_counts import Count
from mbkern._accumulator_hooks import release
from mbkern._accumulator_parameters import Slot
from mbkern._accumulator_ranks import check_place, place_in
from mbkern._accumulator_state_checks import check_parts
from mbkern._tensors import describe

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator

_FORMAT = 2
_KEYS = {
    "format", "mode", "compensation", "denominators", "micro_batches", "totals", "sizes",
    "measurements", "measured_whole", "repeated", "omitted", "counts", "sums", "low",
    "additions", "noise_scale",
}  # fmt: skip


def save(accumulator: GradAccumulator) -> dict[str, Any]:
    """Copies of everything that the rest of the window depends on."""
    window, slots = accumulator._window, accumulator._members.all
    return {
        "format": _FORMAT,
        "mode": accumulator.mode,
        "compensation": (accumulator._rounding.kind, accumulator._rounding.seed),
        "denominators": accumulator._names,
        "micro_batches": window.micro_batches,
        "totals": _copied(window.totals),
        "sizes": _copied(window.sizes),
        "measurements": [
            (m.micro_batch, list(m.names), m.squared_norms.clone()) for m in window.measurements
        ],
        # What was not measured at all is not whole either.
        "measured_whole": window.measured_whole
        and (accumulator._options.measures or not window.micro_batches),
        "repeated": window.repeated,
        "omitted": sorted(window.omitted),
        "counts": {name: (count.number, count.tensor) for name, count in window.counts.items()},
        "sums": {slot.name: _received(slot, slot.buffers) for slot in slots},
        "low": {slot.name: _received(slot, slot.low) for slot in slots},
        "additions": {slot.name: slot.additions for slot in slots},
        "noise_scale": (
            None if accumulator.noise_scale is None else accumulator.noise_scale.state_dict()
        ),
        "divisor": window.divisor,
        "place": _place(accumulator),
        "clipped": None if accumulator._clipped is None else accumulator._clipped.clone(),
    }


def _place(accumulator: GradAccumulator) -> tuple[int, int]:
    shards = accumulator._shards
    return place_in(accumulator._group if shards is None else shards.group)


def _received(slot: Slot, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies of those of a slot's tensors that hold something in this window."""
    return [
        tensor.clone() if received and tensor is not None else None
        for tensor, received in zip(tensors, slot.received, strict=True)
    ]


def _kind(tensor: Any) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _copied(numbers: Any) -> Any:
    """A dict of numbers and tensors that nobody else changes."""
    if numbers is None:
        return None
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in numbers.items()}


def _pair(compensation: Any) -> tuple[Any, Any]:
    pair = isinstance(compensation, tuple | list) and len(compensation) == 2
    kind, seed = compensation if pair else (0, 0)
    if not isinstance(kind, str | None) or not isinstance(seed, int):
        raise ValueError(
            f"mbkern: not the state of a GradAccumulator: its 'compensation' is {compensation!r}"
        )
    return kind, seed


def load(accumulator: GradAccumulator, state: Mapping[str, Any]) -> None:
    """Check everything, then take it over."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"mbkern: the state of a GradAccumulator is a dict, not {type(state).__name__}"
        )
    missing = _KEYS - set(state)
    if missing:
        raise ValueError(f"mbkern: not the state of a GradAccumulator: it has no {sorted(missing)}")
    rounding = accumulator._rounding
    kind, seed = _pair(state["compensation"])
    expected = (_FORMAT, accumulator.mode, rounding.kind, accumulator._names)
    if not isinstance(state["format"], int):
        raise ValueError(f"mbkern: the state is of format {state['format']!r}, here {_FORMAT}")
    names_there = state["denominators"]
    if not isinstance(names_there, tuple | list):
        names_there = (names_there,)
    found = (state["format"], state["mode"], kind, tuple(names_there))
    if expected != found:
        raise ValueError(
            "mbkern: the state is of another accumulator: (format, mode, compensation, "
            "denominators) is "
            f"{found}, here {expected}"
        )
    check_parts(state, accumulator._names, accumulator._options.sets)
    if state["micro_batches"]:
        shards = accumulator._shards is not None
        check_place(state.get("place"), _place(accumulator), shards)
    none: list[Tensor | None] = [None] * accumulator._options.sets
    sums = {name: saved or none for name, saved in state["sums"].items()}  # []: it was frozen
    low_parts = {name: saved or none for name, saved in state["low"].items()}
    members = accumulator._members
    members.update()
    names = {slot.name for slot in members.all}
    if names != set(sums):
        raise ValueError(
            "mbkern: the state is of other parameters; only there: "
            f"{sorted(set(sums) - names)}, only here: {sorted(names - set(sums))}"
        )
    members.thaw(slot for slot in members.frozen if sums[slot.name] != none)
    for slot in members.slots:
        for saved, buffer in zip(sums[slot.name], slot.buffers, strict=True):
            if saved is not None and (saved.shape, saved.dtype) != (buffer.shape, buffer.dtype):
                raise ValueError(
                    f"mbkern: the sums of {slot.name} are {describe(saved)} in the state, "
                    f"{describe(buffer)} here"
                )
        low = low_parts.get(slot.name, [])
        wanted = [
            to if saved is not None else None
            for saved, to in zip(sums[slot.name], slot.low, strict=True)
        ]
        if [_kind(t) for t in low] != [_kind(t) for t in wanted]:
            raise ValueError(
                f"mbkern: the low parts of {slot.name} are {[_kind(t) for t in low]} in the state, "
                f"{[_kind(t) for t in wanted]} here"
            )
        if slot.name not in state["additions"]:
            raise ValueError(f"mbkern: the state does not say how often {slot.name} was added to")
    unknown = set(state["counts"]) - set(accumulator._names)
    if unknown:
        raise ValueError(f"mbkern: the state has counts of {sorted(unknown)}, which are unknown")
    if kind == "stochastic" and seed != rounding.seed:
        raise ValueError(
            f"mbkern: the state is of seed {seed}, this accumulator of {rounding.seed}"
        )
    accumulator.reset()
    release(members.slots, accumulator._into)
    for slot in members.slots:
        for which, saved in enumerate(sums[slot.name]):
            slot.received[which] = saved is not None
            for tensor, of in ((slot.buffers, sums), (slot.low, low_parts)):
                value, to = of[slot.name][which], tensor[which]
                if value is not None and to is not None:
                    to.copy_(value)
        slot.additions = state["additions"][slot.name]
    window = accumulator._window
    for name, (number, tensor) in state["counts"].items():
        count = window.counts[name] = Count()
        count.number, count.tensor = number, tensor
    window.totals = _copied(state["totals"])
    window.sizes = _copied(state["sizes"]) or {}
    window.measurements = [
        Measurement(k, list(names), squares.clone()) for k, names, squares in state["measurements"]
    ]
    window.measured_whole, window.repeated = state["measured_whole"], state["repeated"]
    window.omitted = set(state["omitted"])
    window.micro_batches = state["micro_batches"]
    window.divisor = state.get("divisor")
    if accumulator.noise_scale is not None and state["noise_scale"] is not None:
        accumulator.noise_scale.load_state_dict(state["noise_scale"])
    clipped = state.get("clipped")
    accumulator._clipped = None if clipped is None else clipped.clone()
