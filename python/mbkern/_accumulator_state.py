"""Saving an accumulator in the middle of a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mbkern._accumulator_collect import Measurement
from mbkern._accumulator_counts import Count
from mbkern._accumulator_hooks import release
from mbkern._tensors import describe

if TYPE_CHECKING:
    from mbkern._accumulator import GradAccumulator

_FORMAT = 1
_KEYS = {
    "format", "mode", "denominators", "micro_batches", "totals", "sizes", "measurements",
    "measured_whole", "counts", "sums",
}  # fmt: skip


def save(accumulator: GradAccumulator) -> dict[str, Any]:
    """Copies of everything that the rest of the window depends on."""
    return {
        "format": _FORMAT,
        "mode": accumulator.mode,
        "denominators": accumulator._names,
        "micro_batches": accumulator._micro_batches,
        "totals": _copied(accumulator._totals),
        "sizes": _copied(accumulator._sizes),
        "measurements": [
            (m.micro_batch, list(m.names), m.squared_norms.clone())
            for m in accumulator._measurements
        ],
        "measured_whole": accumulator._measured_whole,
        "counts": {
            name: (count.number, count.tensor) for name, count in accumulator._counts.items()
        },
        "sums": {
            slot.name: [
                buffer.clone() if received else None
                for buffer, received in zip(slot.buffers, slot.received, strict=True)
            ]
            for slot in accumulator._slots
        },
    }


def _copied(numbers: Any) -> Any:
    """A dict of numbers and tensors that nobody else changes."""
    if numbers is None:
        return None
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in numbers.items()}


def load(accumulator: GradAccumulator, state: Mapping[str, Any]) -> None:
    """Check everything, then take it over."""
    missing = _KEYS - set(state)
    if missing:
        raise ValueError(f"mbkern: not the state of a GradAccumulator: it has no {sorted(missing)}")
    expected = (_FORMAT, accumulator.mode, accumulator._names)
    found = (state["format"], state["mode"], tuple(state["denominators"]))
    if expected != found:
        raise ValueError(
            "mbkern: the state is of another accumulator: (format, mode, denominators) is "
            f"{found}, here {expected}"
        )
    sums = state["sums"]
    names = {slot.name for slot in accumulator._slots}
    if names != set(sums):
        raise ValueError(
            "mbkern: the state is of other parameters; only there: "
            f"{sorted(set(sums) - names)}, only here: {sorted(names - set(sums))}"
        )
    for slot in accumulator._slots:
        for saved, buffer in zip(sums[slot.name], slot.buffers, strict=True):
            if saved is not None and (saved.shape, saved.dtype) != (buffer.shape, buffer.dtype):
                raise ValueError(
                    f"mbkern: the sums of {slot.name} are {describe(saved)} in the state, "
                    f"{describe(buffer)} here"
                )
    accumulator.reset()
    release(accumulator._slots, accumulator._into)
    for slot in accumulator._slots:
        for which, saved in enumerate(sums[slot.name]):
            slot.received[which] = saved is not None
            if saved is not None:
                slot.buffers[which].copy_(saved)
    for name, (number, tensor) in state["counts"].items():
        count = accumulator._counts[name] = Count()
        count.number, count.tensor = number, tensor
    accumulator._totals = _copied(state["totals"])
    accumulator._sizes = _copied(state["sizes"]) or {}
    accumulator._measurements = [
        Measurement(k, list(names), squares.clone()) for k, names, squares in state["measurements"]
    ]
    accumulator._measured_whole = state["measured_whole"]
    accumulator._micro_batches = state["micro_batches"]
