"""Zeros, infinities, NaN, denormals and the largest numbers give what torch gives in float64.

Every row of one to four columns over the lattice, for every loss, dtype and ISA.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case, Sample, Variation
from torch import Tensor
from torch.nn import functional as F

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("restored")

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


# ---- every element-wise loss ---------------------------------------------------------------------

POINTWISE = [case for case in CASES if not case.has_rows]


def numbers(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    tiny, signed = info.smallest_normal, (1.0, 88.0, float("inf"))
    values = [0.0, -0.0, tiny, tiny / 2, *signed, *(-v for v in signed), info.max, float("nan")]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


SHARES = ("binary_cross_entropy_with_logits", "sigmoid_focal_loss")  # targets in [0, 1]
COUNTS = ("kl_div", "poisson_nll_loss", "tweedie_nll_loss")  # targets from 0


def pairs_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All pairs in the loss's domain, and NaN; torch refuses it for binary_cross_entropy."""
    x = y = numbers(dtype)
    if case.name == "binary_cross_entropy":
        x = y = x[(x >= 0) & (x <= 1)]
    elif case.name in SHARES:
        y = y[~((y < 0) | (y > 1))]
    elif case.name in COUNTS:
        y = y[~(y < 0)]
    x, y = torch.meshgrid(x, y, indexing="ij")
    return x.flatten(), y.flatten()


def by_formula(case: Case, sample: Sample, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients of torch operations in ``dtype``, as float64."""
    wide, leaves = case.leaves(sample.to(dtype))
    loss = case.reference(wide.input, wide.target, reduction="none", **wide.options)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach().double(), [g.double() for g in grads]


def agrees(got: Tensor, want: Tensor, size: Tensor) -> Tensor:
    """Where a result is that number: NaN and infinities after rounding, 4 ulp elsewhere."""
    rounded = want.to(got.dtype)
    eps = torch.finfo(got.dtype).eps
    allowed = (
        4 * eps * torch.maximum(want.abs(), size.nan_to_num(0, 0, 0)) + torch.finfo(got.dtype).tiny
    )
    close = (got.double() - want).abs() <= allowed
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    huge = torch.finfo(got.dtype).max / 64  # what overflows on the way
    same |= (got * rounded.sign() >= huge) & (rounded.abs() >= huge)
    return torch.where(rounded.isfinite(), close, same)


#: Documented differences: loss, variation, number of the result (the loss, gradients), dtype, and
#: how many pairs of what kind there are.
#:   limit    the formula has 0 * inf or inf - inf on its way; here is what it tends to
#:   NaN      a derivative of a NaN or of inf - inf, that the formula's mask makes 0, or a limit
#:   clamped  the logarithms in the gradient of the target are at least -100, as in the loss
#:   cancels  torch subtracts numbers whose difference is left here
#:   overflow a term is too large for the type, and their sum is not
KINDS: dict[str, Callable[..., Tensor]] = {
    "limit": lambda x, y, got, want: want.isnan() & ~got.isnan() & ~x.isnan(),
    "NaN": lambda x, y, got, want: got.isnan() & ~want.isnan(),
    "clamped": lambda x, y, got, want: (got.abs() == 100) | (want.isinf() & got.isfinite()),
    "overflow": lambda x, y, got, want: got.isinf() & want.isfinite() & (y > 1e38),
    "cancels": lambda x, y, got, want: (got - want).abs() < 4e-36,
}
DIFFERENT: dict[tuple[str, str, int, str], dict[str, int]] = {
    ("binary_cross_entropy", "plain", 2, "float32"): {"clamped": 15},
    ("binary_cross_entropy", "plain", 2, "float64"): {"clamped": 25},
    ("binary_cross_entropy_with_logits", "plain", 0, "float32"): {"cancels": 2, "limit": 3},
    ("binary_cross_entropy_with_logits", "plain", 0, "float64"): {"cancels": 4, "limit": 3},
    ("binary_cross_entropy_with_logits", "plain", 1, "float64"): {"cancels": 1},
    ("binary_cross_entropy_with_logits", "positive", 0, "float32"): {"cancels": 2, "limit": 3},
    ("binary_cross_entropy_with_logits", "positive", 1, "float32"): {"cancels": 1},
    ("binary_cross_entropy_with_logits", "positive", 0, "float64"): {"cancels": 4, "limit": 3},
    ("binary_cross_entropy_with_logits", "positive", 1, "float64"): {"cancels": 1},
    ("sigmoid_focal_loss", "plain", 2, "float32"): {"limit": 4},
    ("sigmoid_focal_loss", "plain", 2, "float64"): {"limit": 8},
    ("sigmoid_focal_loss", "none", 2, "float32"): {"limit": 4},
    ("sigmoid_focal_loss", "none", 2, "float64"): {"limit": 4},
    ("sigmoid_focal_loss", "soft", 1, "float32"): {"limit": 1},
    ("sigmoid_focal_loss", "soft", 2, "float32"): {"limit": 5},
    ("sigmoid_focal_loss", "soft", 1, "float64"): {"limit": 1},
    ("sigmoid_focal_loss", "soft", 2, "float64"): {"limit": 5},
    ("sigmoid_focal_loss", "linear", 2, "float32"): {"limit": 4},
    ("sigmoid_focal_loss", "linear", 2, "float64"): {"limit": 4},
    ("sigmoid_focal_loss", "steep", 2, "float32"): {"limit": 4},
    ("sigmoid_focal_loss", "steep", 2, "float64"): {"limit": 8},
    ("squared_hinge_loss", "plain", 1, "float32"): {"NaN": 13},
    ("squared_hinge_loss", "plain", 2, "float32"): {"NaN": 13},
    ("squared_hinge_loss", "plain", 1, "float64"): {"NaN": 13},
    ("squared_hinge_loss", "plain", 2, "float64"): {"NaN": 13},
    ("squared_hinge_loss", "wide", 1, "float32"): {"NaN": 13},
    ("squared_hinge_loss", "wide", 2, "float32"): {"NaN": 13},
    ("squared_hinge_loss", "wide", 1, "float64"): {"NaN": 13},
    ("squared_hinge_loss", "wide", 2, "float64"): {"NaN": 13},
    ("kl_div", "plain", 0, "float32"): {"limit": 7},
    ("kl_div", "plain", 0, "float64"): {"limit": 10},
    ("kl_div", "plain", 2, "float32"): {"limit": 30},
    ("kl_div", "plain", 2, "float64"): {"limit": 30},
    ("poisson_nll_loss", "full", 2, "float32"): {"limit": 43},
    ("poisson_nll_loss", "full", 2, "float64"): {"limit": 43},
    ("tweedie_nll_loss", "plain", 1, "float32"): {"limit": 20},
    ("tweedie_nll_loss", "plain", 1, "float64"): {"clamped": 1, "limit": 20},
    ("tweedie_nll_loss", "gamma", 1, "float32"): {"limit": 20},
    ("tweedie_nll_loss", "gamma", 1, "float64"): {"limit": 20},
    ("tweedie_nll_loss", "gaussian", 0, "float32"): {"overflow": 1},
    ("tweedie_nll_loss", "gaussian", 1, "float32"): {"NaN": 15, "overflow": 1},
    ("tweedie_nll_loss", "gaussian", 1, "float64"): {"NaN": 14},
}
LATTICE = [
    pytest.param(case, variation, dtype, id=f"{case.name}-{variation.name}-{str(dtype)[6:]}")
    for case in POINTWISE
    for variation in case.variations
    if "weight" not in variation.name
    for dtype in (torch.float32, torch.float64)
]


def differences(
    case: Case, variation: Variation, dtype: torch.dtype
) -> dict[int, tuple[Tensor, ...]]:
    """For each result: arguments, result and reference where these are not the same number."""
    x, y = pairs_of(case, dtype)
    options = {k: v for k, v in variation.options.items() if not callable(v)}
    names = case.arguments
    if "pos_weight" in variation.options:
        options["pos_weight"] = torch.full_like(x, 2.0)
    elif case.third is not None:
        options[names[2]] = case.third(x)
    sample = Sample(x, y, options)
    rest = {k: v for k, v in options.items() if k not in names}
    loss, grads = on_every_isa(
        case.name, *case.tensors(sample).values(), argnums=case.differentiable, **rest
    )
    exact, narrow = (by_formula(case, sample, d) for d in (torch.float64, dtype))
    zeros = (torch.zeros(x.shape, dtype=torch.float64),) * 4
    wide = sample.to(torch.float64)
    sizes = zeros if case.size is None else case.size(wide.input, wide.target, **wide.options)
    found = {}
    for i, (got, want, near) in enumerate(
        zip((loss, *grads), (exact[0], *exact[1]), (narrow[0], *narrow[1]), strict=True)
    ):
        size = sizes[i].expand(x.shape)
        bad = ~(agrees(got, want, size) | agrees(got, near, size))
        if bad.any():
            found[i] = (x[bad], y[bad], got[bad].double(), want[bad])
    return found


@pytest.mark.parametrize(("case", "variation", "dtype"), LATTICE)
def test_lattice(case: Case, variation: Variation, dtype: torch.dtype) -> None:
    """torch's results, in float64 or in the computed type, but for those that are listed."""
    seen: dict[int, dict[str, int]] = {}
    for i, (x, y, got, want) in differences(case, variation, dtype).items():
        counts = seen.setdefault(i, {})
        for a, b, g, w in zip(x, y, got, want, strict=True):
            kind = next((name for name, is_it in KINDS.items() if is_it(a, b, g, w)), None)
            assert kind, f"result {i} of {a.item()}, {b.item()}: {g.item()}, not {w.item()}"
            counts[kind] = counts.get(kind, 0) + 1
    listed = {
        i: counts
        for (name, which, i, type), counts in DIFFERENT.items()
        if (name, which, type) == (case.name, variation.name, str(dtype)[6:])
    }
    assert seen == listed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", ["beta", "delta"])
def test_thresholds_at_the_ends(option: str, dtype: torch.dtype, isa: str) -> None:
    """Infinite, or larger or smaller than any number of the type: torch's loss and gradient."""
    name = "smooth_l1_loss" if option == "beta" else "huber_loss"
    values = torch.tensor([0.0, -0.0, 1e-30, -1.0, 3.5, -1e15] * 40, dtype=dtype)
    for limit in (math.inf, 1e300, 1e44, 1e42, 1e39, 3e38, 1e-38, 1e-39, 1e-46, 1e-50, 1e-310):
        ours, torchs = (values.clone().requires_grad_() for _ in range(2))
        target, options = torch.zeros_like(values), {option: limit, "reduction": "none"}
        loss = getattr(mbkern.functional, name)(ours, target, **options)
        want = getattr(torch.nn.functional, name)(torchs, target, **options)
        loss.sum().backward()
        want.sum().backward()
        assert torchs.grad is not None
        torchs.grad[values == 0] = 0  # torch: -1 where the threshold is rounded to 0
        torch.testing.assert_close(loss, want, rtol=2e-6, atol=1e-37)
        torch.testing.assert_close(ours.grad, torchs.grad, rtol=2e-6, atol=1e-37)
        assert not torch.signbit(loss).any()
