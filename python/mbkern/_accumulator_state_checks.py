"""Whether a dict is the state of an accumulator, before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mbkern._accumulator_counts import as_count
from mbkern._noise_scale import NoiseScale


def check_parts(state: Mapping[str, Any], names: Sequence[str], sets: int) -> None:
    """Raise ValueError for parts that ``state_dict`` never gives.

    Args:
        state: with all keys.
        names: of denominators.
        sets: of buffers.
    """
    batches = state["micro_batches"]
    _require(_is_count(batches), "micro_batches", batches)
    for key in ("measured_whole", "repeated"):
        _require(isinstance(state[key], bool), key, state[key])
    for key in ("sums", "low"):
        parts = _dict(state, key)
        for saved in parts.values():  # []: it was frozen
            _require(isinstance(saved, list) and len(saved) in (0, sets), key, saved)
            _require(all(t is None or _is_tensor(t) for t in saved), key, saved)
    for times in _dict(state, "additions").values():
        _require(_is_count(times), "additions", times)
    for pair in _dict(state, "counts").values():
        _require(isinstance(pair, tuple | list) and len(pair) == 2, "counts", pair)
        number, tensor = pair
        _require(isinstance(number, float), "counts", pair)
        _require(tensor is None or _is_tensor(tensor), "counts", pair)
        for part in (number,) if tensor is None else (number, tensor):
            _check_number(part, "counts")
    if state["totals"] is not None:
        for name, total in _dict(state, "totals").items():
            _require(name in names, "totals", name)
            _check_number(total, "totals")
    for number, size in (_dict(state, "sizes") if state["sizes"] is not None else {}).items():
        _require(_is_count(number) and number < batches, "sizes", number)
        _check_number(size, "sizes")
    omitted, sizes = state["omitted"], state["sizes"] or ()
    _require(isinstance(omitted, list | tuple | set), "omitted", omitted)
    _require(all(name in names for name in omitted), "omitted", omitted)
    _check_measurements(state["measurements"], batches)
    if state["measurements"] and state["measured_whole"] and not omitted:
        _require(len(sizes) == batches, "sizes", sizes)
    if state["noise_scale"] is not None:
        NoiseScale().load_state_dict(state["noise_scale"])
    clipped, divisor = state.get("clipped"), state.get("divisor")
    shares = clipped is None or (_is_tensor(clipped) and clipped.shape == (2,))
    _require(shares, "clipped", clipped)
    _require(divisor is None or isinstance(divisor, float | int), "divisor", divisor)


def _check_measurements(measurements: Any, batches: int) -> None:
    _require(isinstance(measurements, list | tuple), "measurements", measurements)
    for measured in measurements:
        _require(
            isinstance(measured, tuple | list) and len(measured) == 3, "measurements", measured
        )
        number, names, squares = measured
        _require(_is_count(number) and number < batches, "measurements", number)
        _require(
            isinstance(names, list) and all(isinstance(name, str) for name in names),
            "measurements", names,
        )  # fmt: skip
        good = _is_tensor(squares) and squares.shape == (len(names),)
        _require(good and squares.is_floating_point(), "measurements", squares)


def _require(good: bool, key: str, value: Any) -> None:
    if not good:
        raise ValueError(
            f"mbkern: not the state of a GradAccumulator: in its {key!r} is {str(value)[:80]!s}"
        )


def _dict(state: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    part = state[key]
    _require(isinstance(part, Mapping), key, part)
    found: Mapping[Any, Any] = part
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def _check_number(value: Any, key: str) -> None:
    _require(_is_tensor(value) if isinstance(value, Tensor) else True, key, value)
    try:
        as_count(value, key)
    except (ValueError, RuntimeError, OverflowError):
        _require(False, key, value)
