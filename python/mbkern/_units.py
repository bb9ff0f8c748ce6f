"""Numbers as people read them: three digits with a unit, never ``1e+03 ms``."""

from __future__ import annotations

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def _three_digits(value: float) -> str:
    """At least three, and no power of ten."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def seconds(value: float) -> str:
    """A time in seconds, milli-, micro- or nanoseconds."""
    # What is rounded to 1000 of a unit is 1 of the next one.
    size, unit = next((t for t in _TIMES if abs(value) >= 0.9995 * t[0]), _TIMES[-1])
    return f"{_three_digits(value / size)} {unit}"


def size(value: float) -> str:
    """A number of bytes; units are powers of 1024."""
    scale, unit = next((s for s in _SIZES if abs(value) >= 0.9995 * s[0]), _SIZES[-1])
    return f"{_three_digits(value / scale)} {unit}"


def count(value: float) -> str:
    """At least four digits: ``0.1235``, ``12.35``, ``123457``."""
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"
