"""Zeros, infinities, NaN, denormals and the largest numbers give what torch gives in float64.

Every row of one to four columns over the lattice, for every loss, dtype and ISA.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mbkern
from mbkern import _C

CANONICAL = {
    torch.float32: 0x7FC00000,
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float64: 0x7FF8000000000000,
}
INTEGER = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
DTYPES = list(CANONICAL)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def on_every_isa(*arguments: object, **options: object) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The unreduced loss in the computed type, and the gradients: the same bits on every ISA."""
    first = None
    for isa in _C.isas():
        _C.set_isa(isa)
        loss, grads = mbkern.loss_and_grad(*arguments, reduction="none", **options)
        if first is None:
            first = (loss, grads)
        for got, want in zip((loss, *grads), (first[0], *first[1]), strict=True):
            integer = INTEGER[got.dtype]
            assert torch.equal(got.view(integer), want.view(integer)), isa
    assert first is not None
    return first


def lattice(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * 0.5  # exact in every dtype
    signed = [s * v for v in (0.0, 1.0, denormal, info.max, float("inf")) for s in (1, -1)]
    return [*signed, float("nan")]


def rows(dtype: torch.dtype, columns: int) -> Tensor:
    """All rows of the lattice; of four columns, those without -0, -1 and -denormal."""
    values = lattice(dtype)
    if columns == 4:
        values = [v for v in values if not -1 <= v <= 0] + [0.0]
    every = list(itertools.product(values, repeat=columns))
    return torch.tensor(every, dtype=torch.float64).to(dtype)


def assert_same(got: Tensor, want: Tensor, atol: float, what: str) -> None:
    """Infinities and NaN where float64 has them after rounding; 4 ulp, or ``atol``, elsewhere.

    Zeros may differ in sign: torch's own depend on the order of its operations.
    """
    rounded = want.to(got.dtype)
    finite = rounded.isfinite()
    same = torch.where(finite, True, (got == rounded) | (got.isnan() & rounded.isnan()))
    error = (got.double() - want).abs()
    if want.dtype is got.dtype:  # torch's float64 overflows on the way to the largest results
        huge = torch.finfo(got.dtype).max / 64
        same |= (got * rounded.sign() >= huge) & (rounded.abs() >= huge)
    allowed = 4 * torch.finfo(got.dtype).eps * want.abs() + atol + torch.finfo(got.dtype).tiny
    close = torch.where(finite, error <= allowed, True)
    bad = (~(same & close)).nonzero()
    assert not len(bad), (
        f"{what}: {len(bad)} differ, first at {bad[0].tolist()}: "
        f"{got[tuple(bad[0])].item()} instead of {want[tuple(bad[0])].item()}"
    )


def differences_overflow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Which rows have finite logits whose difference is infinite in ``dtype``."""
    wide = x.to(dtype)
    lowest = torch.where(wide.isfinite(), wide, torch.inf).amin(1)
    return (wide.amax(1) - lowest).isinf() & x.isfinite().any(1) & wide.amax(1).isfinite()


def reference(
    x: Tensor, target: Tensor, options: dict[str, object], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Losses and gradient by torch, with the extras written out; in ``dtype``, as float64."""
    options = dict(options)
    z, cap = options.pop("z_loss", 0.0), options.pop("softcap", None)
    weight = options.pop("weight", None)
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    logits = leaf if cap is None else cap * torch.tanh(leaf / cap)
    if weight is not None:
        weight = weight.to(dtype)
    if target.is_floating_point():
        target = target.to(dtype)
    loss = F.cross_entropy(logits, target, weight, reduction="none", **options)
    if z:  # torch.logsumexp has a gradient of its own, wrong where lse rounds to the maximum
        m = logits.detach().amax(1)
        lse = m + (logits - m[:, None]).exp().sum(1).log()
        loss = loss + lse * (z * lse)  # in an order that does not overflow early
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().double(), grad.double()


OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.25])},
    "smoothing": {"label_smoothing": 0.125},
    "softcap": {"softcap": 8.0},
    "z_loss": {"z_loss": 0.5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*OPTIONS, "probabilities"])
def test_cross_entropy(kind: str, dtype: torch.dtype) -> None:
    for columns in range(1, 5):
        x = rows(dtype, columns)
        options = dict(OPTIONS.get(kind, {}))
        if "weight" in options:
            options["weight"] = options["weight"][:columns]
        if kind == "probabilities":  # certain, divided and with zeros
            share = torch.tensor([[1, 0, 0, 0], [0.5, 0.25, 0.25, 0], [0.25] * 4])[:, :columns]
            targets = [p.to(dtype).expand_as(x).contiguous() for p in share]
        else:
            targets = [torch.full((len(x),), t) for t in {0, columns - 1}]
        # The terms below exp(-80) (float64: exp(-700)) are 0, which is the documented exception.
        # With targets spread over classes, or with a cap, a gradient is the difference of numbers
        # up to 1 (cap: up to 1 in 1 - tanh^2), each correct to a few ulp of the computed type.
        eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
        # Torch's own gradient in float64 is such a difference, p - 1, with any target.
        exact = kind in ("plain", "weight") and dtype is not torch.float64
        atol = 4e-35 if exact else 16 * eps
        for target in targets:
            wide = torch.promote_types(dtype, torch.float32)
            loss, (grad,) = on_every_isa(
                "cross_entropy", x, target, argnums=(0,), loss_dtype=wide, **options
            )
            want_loss, want_grad = reference(x, target, options)
            if kind == "smoothing" or (kind == "probabilities" and dtype is torch.float64):
                # Second exception: a sum over q_j (m - x_j) is infinite where a difference of
                # finite logits is too large for the type it is taken in, as torch's is in that
                # type: fp64 with probabilities, else the computed type.
                far = differences_overflow(x, loss.dtype)
                want_loss[far], _ = reference(x[far], target[far], options, loss.dtype)
            what = f"{columns} columns, target {target[0].tolist()}"
            assert_same(loss, want_loss, atol, f"loss, {what}")
            assert_same(grad, want_grad, atol, f"gradient, {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_not_looked_at(dtype: torch.dtype) -> None:
    """Whatever an ignored row holds, its loss and gradient are +0 (torch's gradient may be NaN)."""
    for columns in (4, 130):
        x = rows(dtype, 2)
        x = x.repeat(1, columns // 2)
        target = torch.full((len(x),), -100)
        loss, (grad,) = on_every_isa("cross_entropy", x, target, argnums=(0,))
        assert not loss.view(INTEGER[dtype]).any()
        assert not grad.view(INTEGER[dtype]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 63, 64, 129, 1030])
def test_long_rows(dtype: torch.dtype, position: int) -> None:
    """Each special value at each place that a long row treats in a way of its own."""
    values = torch.tensor(lattice(dtype), dtype=torch.float64).to(dtype)
    x = torch.linspace(-3, 3, 1031, dtype=torch.float64).to(dtype).repeat(len(values), 1)
    x[:, position] = values
    for t in {position, 5}:
        target = torch.full((len(x),), t)
        wide = torch.promote_types(dtype, torch.float32)
        loss, (grad,) = on_every_isa("cross_entropy", x, target, argnums=(0,), loss_dtype=wide)
        want_loss, want_grad = reference(x, target, {})
        # The sum of 1031 terms: at most 21 roundings of 2^-24 (docs/numerics.md), and exp's ulp.
        eps = torch.finfo(loss.dtype).eps
        assert_same(loss, want_loss, 24 * eps * 16, f"loss, target {t}")
        assert_same(grad, want_grad, 24 * eps, f"gradient, target {t}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mse_loss", "half_squared_error"])
def test_pointwise(name: str, dtype: torch.dtype) -> None:
    pairs = rows(dtype, 2)
    x, y = pairs.unbind(1)
    wide = torch.promote_types(dtype, torch.float32)
    loss, (dx, dy) = on_every_isa(name, x, y, argnums=(0, 1), loss_dtype=wide)
    difference = x.double() - y.double()
    factor = 1.0 if name == "mse_loss" else 0.5
    assert_same(loss, factor * difference * difference, 0.0, "loss")
    assert_same(dx, 2 * factor * difference, 0.0, "gradient of the input")
    assert_same(dy, -2 * factor * difference, 0.0, "gradient of the target")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_nan_is_canonical(dtype: torch.dtype) -> None:
    """Whatever NaN goes in, one NaN comes out: payloads and signs differ between chips."""
    integer, canonical = INTEGER[dtype], CANONICAL[dtype]
    infinity = torch.tensor([float("inf")], dtype=dtype).view(integer).item()
    sign = torch.tensor([-0.0], dtype=dtype).view(integer).item()
    for payload in (infinity | 1, infinity | 1 | sign, canonical | 1, canonical | sign):
        for columns in (3, 130):
            x = torch.zeros(2, columns, dtype=dtype)
            x.view(integer)[1, 1] = payload
            target = torch.zeros(2, dtype=torch.int64)
            for accumulate in (False, True):
                loss, (grad,) = on_every_isa(
                    "cross_entropy", x, target, argnums=(0,), accumulate=accumulate
                )
                assert loss[1].view(integer).item() == canonical
                assert (grad[1].view(INTEGER[grad.dtype]) == CANONICAL[grad.dtype]).all()
                assert not grad[0].isnan().any()
            loss, (grad,) = on_every_isa("mse_loss", x, torch.zeros_like(x), argnums=(0,))
            assert loss[1, 1].view(integer).item() == canonical
            assert grad[1, 1].view(integer).item() == canonical
