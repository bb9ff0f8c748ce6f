"""The elementary functions: the same bits on every instruction set, and the stated errors.

A sample of all inputs; `make exhaustive` takes every fp32 input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mbkern import _C

Array = np.ndarray[Any, np.dtype[Any]]


def softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def log_cosh(x: Array) -> Array:
    a = np.abs(x)
    near = np.log1p(2 * np.sinh(np.minimum(a, 1) / 2) ** 2)
    return np.where(a < 1, near, a - np.log(a.dtype.type(2)) + np.log1p(np.exp(-2 * a)))


REFERENCES: dict[str, Callable[[Array], Array]] = {
    "exp_nonpositive": np.exp,
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "tanh": np.tanh,
    "log_cosh": log_cosh,
    "log_cosh_slope": np.tanh,
}
# ulp in fp32 and in fp64; the others: 2
BOUNDS = {"exp_nonpositive": 1.05, "exp": 1.05}
BOUNDS_64 = {"log_cosh": 7.0}
NAMES = list(REFERENCES)
TYPES = [np.float32, np.float64]


def apply(isa: str, name: str, x: Array) -> Array:
    x = np.ascontiguousarray(x)
    y = np.full_like(x, 12345.0)
    _C.elementary(isa, name, x.dtype == np.float64, x.ctypes.data, y.ctypes.data, len(x))
    return y


def bits(x: Array) -> Array:
    return x.view(np.uint32 if x.dtype == np.float32 else np.uint64)


def every_pattern(dtype: type) -> Array:
    """Bit patterns of all signs and exponents at a prime stride, NaNs among them."""
    if dtype is np.float32:
        return np.arange(0, 1 << 32, 4093, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.arange(0, 1 << 64, (1 << 45) - 55, dtype=np.uint64).view(np.float64)


def numbers(dtype: type) -> Array:
    """Every pattern, and more where the functions have most to do: from 2^-60 to 2^10."""
    rng = np.random.default_rng(1)
    n = 300_000
    middle = rng.choice([-1.0, 1.0], n) * np.exp2(rng.uniform(-60, 10, n))
    near_one = 1 + np.exp2(rng.uniform(-52, 0, n)) * rng.choice([-1.0, 1.0], n)
    return np.concatenate((every_pattern(dtype), middle.astype(dtype), near_one.astype(dtype)))


def domain(name: str, x: Array) -> Array:
    return np.copysign(x, -1) if name == "exp_nonpositive" else x


def errors(got: Array, want: Array, dtype: type) -> Array:
    """In units in the last place of the exact result."""
    info = np.finfo(dtype)
    _, exponent = np.frexp(want)
    lowest = info.minexp - info.nmant
    ulp = np.ldexp(np.ones_like(want), np.maximum(exponent - 1 - info.nmant, lowest))
    return np.abs(got.astype(want.dtype) - want) / ulp


def test_the_list_is_complete() -> None:
    assert _C.elementary_functions() == NAMES


@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_every_isa(name: str, dtype: type) -> None:
    x = domain(name, numbers(dtype))
    want = bits(apply("scalar", name, x))
    for isa in _C.isas():
        got = bits(apply(isa, name, x))
        where = np.flatnonzero(got != want)
        assert not len(where), f"{isa}: {len(where)} differ, first {x[where[0]].item().hex()}"
        for n in range(40):  # vectors that are not full
            assert (bits(apply(isa, name, x[1000 : 1000 + n])) == want[1000 : 1000 + n]).all()


@pytest.mark.parametrize("name", NAMES)
def test_error_in_float32(name: str) -> None:
    x = domain(name, numbers(np.float32))
    with np.errstate(all="ignore"):
        want = REFERENCES[name](x.astype(np.float64))
    check_errors(name, x, want, BOUNDS.get(name, 2.0), cut=-80.0)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="NOT CHECKED: no long double")
@pytest.mark.parametrize("name", NAMES)
def test_error_in_float64(name: str) -> None:
    x = domain(name, numbers(np.float64))
    with np.errstate(all="ignore"):
        want = REFERENCES[name](x.astype(np.longdouble))
    check_errors(name, x, want, BOUNDS_64.get(name, 2.0), cut=-700.0)


def check_errors(name: str, x: Array, want: Array, bound: float, cut: float) -> None:
    """``want`` has at least 11 bits more than the results: its own error is below 0.001 ulp."""
    if name == "exp_nonpositive":  # 0 below the cut, and for NaN
        want = np.where(x >= cut, want, 0)
    got = apply(_C.isa(), name, x)
    with np.errstate(all="ignore"):
        rounded = want.astype(x.dtype)
        worst = np.where(np.isfinite(rounded), errors(got, want, x.dtype.type), 0)
    special = ~np.isfinite(rounded)
    assert np.array_equal(got[special], rounded[special], equal_nan=True)
    at = int(np.argmax(worst))
    assert worst[at] <= bound + 0.001, f"{float(worst[at])} ulp at {x[at].item().hex()}"
    assert worst[at] > 0.4, "nothing was measured"


@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("isa", _C.isas())
def test_special_values(isa: str, dtype: type) -> None:
    """Those of C99, and the one NaN; zeros keep their sign."""
    inf, nan = math.inf, math.nan
    table = {
        "exp_nonpositive": [(0.0, 1.0), (-0.0, 1.0), (-inf, 0.0), (nan, 0.0), (-1e30, 0.0)],
        "exp": [(0.0, 1.0), (-0.0, 1.0), (-inf, 0.0), (inf, inf), (1e30, inf), (-1e30, 0.0)],
        "expm1": [(0.0, 0.0), (-0.0, -0.0), (-inf, -1.0), (inf, inf), (1e30, inf), (-1e30, -1.0)],
        "log": [(1.0, 0.0), (0.0, -inf), (-0.0, -inf), (inf, inf), (-1.0, nan), (-inf, nan)],
        "log1p": [(0.0, 0.0), (-0.0, -0.0), (-1.0, -inf), (inf, inf), (-2.0, nan), (-inf, nan)],
        "sigmoid": [(0.0, 0.5), (-0.0, 0.5), (inf, 1.0), (-inf, 0.0), (1e30, 1.0), (-1e30, 0.0)],
        "softplus": [(inf, inf), (-inf, 0.0), (1e30, 1e30), (-1e30, 0.0)],
        "tanh": [(0.0, 0.0), (-0.0, -0.0), (inf, 1.0), (-inf, -1.0), (1e30, 1.0)],
        "log_cosh": [(0.0, 0.0), (-0.0, 0.0), (inf, inf), (-inf, inf), (-1e30, 1e30)],
    }
    table["log_cosh_slope"] = table["tanh"]
    for name, pairs in table.items():
        if name != "exp_nonpositive":
            pairs = [*pairs, (nan, nan), (-nan, nan)]
        x, y = (np.array(column, dtype=dtype) for column in zip(*pairs, strict=True))
        got = apply(isa, name, x)
        assert bits(got).tolist() == bits(y).tolist(), f"{name}{x} is {got}"


@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "float64"])
def test_odd_functions_are_odd(dtype: type) -> None:
    x = np.abs(numbers(dtype))
    x = x[~np.isnan(x)]
    for name in ("tanh", "log_cosh_slope"):
        assert (bits(apply(_C.isa(), name, -x)) == bits(-apply(_C.isa(), name, x))).all()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no elementary function 'cbrt'"):
        _C.elementary("scalar", "cbrt", False, 0, 0, 0)
    with pytest.raises(ValueError, match="unknown ISA 'sse9'"):
        _C.elementary("sse9", "exp", False, 0, 0, 0)
