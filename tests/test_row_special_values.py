"""Losses over rows, and their gradients, at zeros, denormals, huge numbers, infinities and NaN.

One or two elements of each row are special. test_special_values.py has this for the losses of
elements. Of every row it is asked whether it is right, by the formula in fp64, and whether it is
the same bits from every entry, instruction set and layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import check
from row_calls import every_case, through_autograd
from row_case import RowCase, RowSample, Variation
from row_cases import ROW_CASES
from row_exact import SOFTMAXES, Exact, by_autograd, computed, exact, in_torch
from row_results import differentiate, same_bits
from row_specials import CASES, COLUMNS, DTYPES, chosen, judged, largest, rows, specials
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("restored", "one_thread")


def agrees(case: RowCase, got: Tensor, want: Tensor, size: Tensor, columns: int) -> Tensor:
    """The same infinity or NaN after rounding, or one rounding of what is right but for a few eps.

    An exponential of a rounded distance d is (d / 2 + 1) eps off, twice that with a temperature. A
    sum has 21 roundings (docs/numerics.md), in fp64 one a column.
    """
    info, rounded, compute = torch.finfo(got.dtype), want.to(got.dtype), computed(got.dtype)
    many = case.name in SOFTMAXES
    factor = 24.0 + (104 if many else 0)
    if compute is torch.float64:
        factor = 24.0 + columns + (1000 if many else 0)
    relative = factor * torch.finfo(compute).eps
    _, exponent = torch.frexp(want.abs().nan_to_num(0, 0, 0).clamp(min=info.tiny))
    half_ulp = info.eps * torch.exp2(exponent.double() - 2)
    size = torch.maximum(want.abs(), size.double().abs().nan_to_num(0, 0, 0))
    # Logits too low to count have a share of e^-80 at the most
    allowed = half_ulp + relative * size + 2 * info.tiny * info.eps + (1e-32 if many else 0)
    close = (got.double() - want).abs() <= allowed
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    return torch.where(rounded.isfinite(), close, same)


#: Differences from the exact result that are meant, by loss:
#:   overflow  a sum or a term of it is too large for the type; over its divisor it would not be
#:   NaN       a derivative of a loss that is infinite or NaN: torch's masks make it 0, or a limit
#:   limit     torch has 0 * inf or inf - inf on its way, in the gradient of a loss that is 0 or
#:             infinite; here is what it tends to
#:   masked    as before where the loss is NaN: elements of its gradient are 0
#:   rounded   which side of a margin, or which of two probabilities that agree to all digits is the
#:             larger, is decided by rounding
DIFFERENT: dict[str, set[str]] = {
    "multi_margin_loss": {"overflow", "rounded"},
    "multilabel_margin_loss": {"overflow", "rounded"},
    "multilabel_soft_margin_loss": {"overflow"},
    "cosine_embedding_loss": {"limit"},
    "triplet_margin_loss": {"limit", "NaN", "masked"},
    "softmax_focal_loss": {"limit"},
    "tv_distance_with_logits": {"rounded"},
}


def kinds(
    case: RowCase, sample: RowSample, got: list[Tensor], exact: Exact, bad: list[Tensor]
) -> Iterator[tuple[str, int, int]]:
    """How results differ from the exact ones: the kind, the result, and the first such item."""
    compute, columns = computed(got[1].dtype), got[1].shape[-1]
    want, sizes = exact
    limit = torch.finfo(compute).max / (8 * columns)
    for k, (g, w, odd) in enumerate(zip(got, want, bad, strict=True)):
        loss = want[0].to(compute)
        loss = loss.unsqueeze(-1).expand_as(g) if k else loss
        if case.name == "tv_distance_with_logits":
            rounded = (loss < 1e-6) & ((g.double() - w).abs() <= 2 * sizes[k])
        else:
            near = by_autograd(sample, case, in_torch(case), compute)[k]
            rounded = (g.double() - near).abs() <= torch.finfo(g.dtype).eps * near.abs()
        no = torch.zeros_like(odd)
        found = {
            "overflow": g.isinf() & (g.sign() == w.sign()) & (w.abs() >= limit),
            "NaN": g.isnan() & ~w.isnan() & ~loss.isfinite() if k else no,
            "limit": w.isnan() & ~g.isnan() & ~loss.isnan() if k else no,
            "masked": w.isnan() & (g == 0) & loss.isnan() if k else no,
            "rounded": rounded & g.isfinite() & w.isfinite(),
        }
        for name, is_it in found.items():
            yield from ((name, k, place[0]) for place in (odd & is_it).nonzero()[:1].tolist())
            odd = odd & ~is_it
        yield from (("wrong", k, place[0]) for place in odd.nonzero()[:1].tolist())


def direct(case: RowCase, sample: RowSample, **more: Any) -> list[Tensor]:
    """Loss and gradients from loss_and_grad."""
    name, rest = case.name, sample.options | {"argnums": case.inputs} | more
    if name == "info_nce_loss":  # has no kernel of its own
        name, rest = "softmax_focal_loss", rest | {"gamma": 0.0}
        rest["argnums"] = (0,)
    loss, grads = mbkern.loss_and_grad(name, *sample.tensors.values(), **rest)
    return [loss, *((grads,) if isinstance(grads, Tensor) else grads)]


def variations(case: RowCase) -> list[Variation]:
    """Those that change the formula of a row."""
    apart = ("sample_weight", "denominator", "target", "ignore_index")
    return [v for v in case.variations if not any(name in v.options for name in apart)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_right(case: RowCase) -> None:
    seen = set()
    for variation, dtype, columns in itertools.product(variations(case), DTYPES, COLUMNS):
        values = specials(dtype, largest(case, dtype))
        sample = rows(case, values, columns, variation)
        sample = chosen(sample, judged(case, sample))
        got = direct(case, sample, reduction="none", loss_dtype=computed(dtype))
        want, sizes = exact(case, sample)
        bad = [~agrees(case, g, w, s, columns) for g, w, s in zip(got, want, sizes, strict=True)]
        if not any(b.any() for b in bad):
            continue
        for kind, k, item in kinds(case, sample, got, (want, sizes), bad):
            where = f"{kind} {variation.name} {dtype} {columns} columns, result {k} of item {item}"
            given = [t[item] for t in sample.tensors.values()]
            assert kind in DIFFERENT.get(case.name, ()), (
                f"{where}: {got[k][item]}, not {want[k][item]}, of {given}"
            )
            seen.add(kind)
    assert seen == DIFFERENT.get(case.name, set())


def assert_same(got: list[Tensor], want: list[Tensor], label: str) -> None:
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        assert same_bits(g, w), f"{label}: result {k}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_the_same(case: RowCase) -> None:
    """For every instruction set, entry and layout, and with one gradient only."""
    for variation, dtype, columns in itertools.product(variations(case), DTYPES, COLUMNS):
        sample = rows(case, specials(dtype), columns, variation, step=37)
        label = f"{variation.name} {dtype} {columns} columns"
        want = direct(case, sample, reduction="none")
        first = _C.isa()
        for isa in _C.isas():
            if isa != first:
                _C.set_isa(isa)
                assert_same(direct(case, sample, reduction="none"), want, f"{label} {isa}")
        _C.set_isa(first)
        assert_same(through_autograd(case, sample, reduction="none"), want, f"{label}, autograd")
        for k, name in enumerate(case.inputs if len(case.inputs) > 1 else ()):
            one = direct(case, sample, reduction="none", argnums=(name,))
            assert_same(one, [want[0], want[1 + k]], f"{label}, {name} alone")
        total = direct(case, sample, reduction="sum")
        assert_same(total[1:], want[1:], f"{label}, sum")
        assert_same(
            through_autograd(case, sample, reduction="sum"), total, f"{label}, sum by autograd"
        )
        turned = {
            n: t.t().contiguous().t() if t.dim() > 1 else t for n, t in sample.tensors.items()
        }
        across = direct(case, RowSample(turned, sample.options), reduction="none")
        assert_same(across, want, f"{label}, columns first")


IGNORING = [c for c in CASES if any("ignored" in v.name for v in c.variations)]


@pytest.mark.parametrize("case", IGNORING, ids=lambda case: case.name)
def test_ignored_rows_are_not_looked_at(case: RowCase, isa: str) -> None:
    """Whatever such a row holds, its loss and gradients are +0."""
    for dtype, columns in itertools.product(DTYPES, COLUMNS):
        given = rows(case, specials(dtype), columns, case.variations[0], step=37)
        none = torch.full((len(given.tensors[case.inputs[0]]),), -100)
        if "target" in given.tensors:
            sample = given.of(target=none)
        else:
            sample = RowSample(given.tensors, given.options | {"target": none})
        for result in direct(case, sample, reduction="none"):
            assert same_bits(result, torch.zeros_like(result)), f"{dtype} {columns} columns"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reductions(case: RowCase) -> None:
    """A sum or mean is NaN or infinite where an item is; the gradients of a mean are a share."""
    for dtype, columns in itertools.product(DTYPES, (3, 40)):
        # A share of a slope 1 / x is denormal for the largest x, and has few digits: torch's, too
        values = specials(dtype, min(largest(case, dtype), 1e30))
        sample = rows(case, values, columns, case.variations[0])
        sample = chosen(sample, judged(case, sample))
        _, (_, *sizes) = exact(case, sample)
        options = {"loss_dtype": computed(dtype)}
        loss, *grads = direct(case, sample, reduction="none", **options)
        label = f"{dtype} {columns}"
        usual = loss.isfinite() & (loss.abs() < 1e30)
        for reduction in ("sum", "mean"):
            for what, kept in (
                ("NaN", torch.ones_like(usual)), ("infinite", usual | (loss == math.inf)),
                ("finite", usual),
            ):  # fmt: skip
                count = int(kept.sum()) if reduction == "mean" else 1
                part = chosen(sample, kept)
                total, *shares = direct(case, part, reduction=reduction, **options)
                items = loss[kept].double()
                want = items.sum() / count
                off = len(items) * torch.finfo(loss.dtype).eps * items.abs().sum() / count
                where = f"{label} {reduction} of {what}: {total}, not {want}"
                if want.isfinite():
                    assert (total - want).abs() <= off, where
                else:
                    assert total == want or (total.isnan() and want.isnan()), where
                assert_same(
                    through_autograd(case, part, reduction=reduction)[1:],
                    shares,
                    f"{where}, autograd",
                )
                for share, grad, size in zip(shares, grads, sizes, strict=True):
                    whole = grad[kept].double()
                    size = size.expand_as(grad)[kept]
                    eps = torch.finfo(dtype).eps  # both are rounded
                    close = (share - whole / count).abs() <= 2 * eps * (whole / count).abs()
                    close |= agrees(case, share, whole / count, size / count, columns)
                    same = torch.where(whole.isfinite(), close, share.isnan() == whole.isnan())
                    assert same.all(), f"{where}: gradients"


@every_case
def test_odd_rows(case: RowCase, isa: str) -> None:
    """A row of NaN, infinities or huge numbers changes no bit of another row."""
    for dtype, columns in itertools.product(DTYPES, (9, 70)):
        sample = case.sample((8, columns), dtype, seed=1)
        want = differentiate(case.function, case, sample, "none")
        for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 88.0, -88.0):
            for name in case.inputs:
                odd = sample.tensors[name].clone()
                odd[2], odd[5, 3] = value, value
                got = differentiate(case.function, case, sample.of(**{name: odd}), "none")
                rest = torch.tensor([0, 1, 3, 4, 6, 7])
                for g, w in zip(got, want, strict=True):
                    assert g is not None
                    assert w is not None
                    assert same_bits(g[rest], w[rest]), f"{dtype} {value} in {name}"


@pytest.mark.parametrize("case", [c for c in ROW_CASES if c.torch], ids=lambda case: case.name)
def test_special_values(case: RowCase, isa: str) -> None:
    """NaN and infinite where torch's losses of the same numbers in fp64 are; right elsewhere."""
    assert case.torch is not None
    for columns, dtype in itertools.product((5, 70), DTYPES):
        sample = case.sample((8, columns), dtype, seed=1)
        for value, name in itertools.product(
            (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 88.0, -88.0), case.inputs
        ):
            odd = sample.tensors[name].clone()
            odd[::2, 3] = value
            odd[1] = value
            seen = sample.of(**{name: odd})
            wide = seen.to(torch.float64)
            for k in (0, 1, 3):  # one by one: a huge row must not hide the others
                part = wide.part(slice(k, k + 1))
                loss = case.function(**seen.part(slice(k, k + 1)).tensors, reduction="none")
                want = case.torch(**part.tensors, reduction="none")
                size = case.sizes(part, torch.ones(1), "none")[0]
                check(loss, want, None, f"{case.name} {dtype} {value} in {name}, row {k}", size)


@pytest.mark.xfail(strict=True, reason="differences are fp32 in the gradient: inf * 0 is NaN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triplets_farther_apart_than_numbers(dtype: torch.dtype) -> None:
    """A loss of 0 has the gradient 0, and that of an infinite distance is a unit vector."""
    far = torch.tensor([[3e38, 0.0, 0.0]], dtype=dtype)
    zero = torch.zeros_like(far)
    loss, grads = mbkern.loss_and_grad("triplet_margin_loss", far, zero, -far, argnums=(0, 1, 2))
    assert loss == 0
    assert all((g == 0).all() for g in grads)
    _, grads = mbkern.loss_and_grad("triplet_margin_loss", far, -far, zero, argnums=(1,))
    assert torch.equal(grads[0], torch.tensor([[-1.0, 0, 0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margins_squared(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 4, dtype=dtype)
    x[0, 1] = torch.finfo(dtype).max
    leaf = x.clone().requires_grad_()
    target = torch.tensor([0])
    F.multi_margin_loss(leaf, target, p=2).backward()
    _, (grad,) = mbkern.loss_and_grad("multi_margin_loss", x, target, p=2, argnums=(0,))
    torch.testing.assert_close(grad, leaf.grad)


def test_focal_loss_of_the_largest_numbers() -> None:
    x = torch.zeros(1, 3, dtype=torch.float64)
    x[0, 0] = -torch.finfo(x.dtype).max
    loss, (grad,) = mbkern.loss_and_grad("softmax_focal_loss", x, torch.tensor([0]), argnums=(0,))
    assert loss.isfinite()
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 0.5, 0.5]], dtype=torch.float64))


def test_cosine_of_nothing() -> None:
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    leaf, one = x.clone().requires_grad_(), torch.ones(1, dtype=torch.float64)
    F.cosine_embedding_loss(leaf, y, one).backward()
    _, (grad,) = mbkern.loss_and_grad("cosine_embedding_loss", x, y, one, argnums=(0,))
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-12, atol=0)
