"""Losses over rows, and their gradients, at zeros, denormals, huge numbers, infinities and NaN.

One or two elements of each row are special. test_special_values.py has this for the losses of
elements. Of every row it is asked whether it is right, by the formula in fp64, and whether it is
the same bits from every entry, instruction set and layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import row_formulas as formulas
import row_tensors as tensors
import torch
import torch.nn.functional as F
from case import check
from row_calls import every_case
from row_case import RowCase, RowSample, Variation
from row_cases import ROW_CASES
from row_results import differentiate, same_bits
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COLUMNS = (2, 3, 17, 40, 1100)  # no whole vector, tails, groups of vectors, a long row

CROSS_ENTROPY = RowCase(
    "cross_entropy", ("input",), formulas.focal, F.cross_entropy, mbkern.nn.CrossEntropyLoss,
    tensors.logits, (
        Variation("plain"), Variation("weight", {"weight": tensors.class_weight}),
        Variation("ignored", {"target": tensors.none_left}),
    ),
)  # fmt: skip
CASES = (CROSS_ENTROPY, *ROW_CASES)
CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss", "softmax_focal_loss", "info_nce_loss")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def computed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- the rows ------------------------------------------------------------------------------------


def specials(case: RowCase, dtype: torch.dtype, largest: float | None = None) -> Tensor:
    """With ``largest`` in place of the type's largest number."""
    info = torch.finfo(dtype)
    least, most = info.smallest_normal * info.eps, largest or info.max
    sizes = (0.0, least, info.smallest_normal, 1.0, 100.0, most, math.inf)
    values = [*(s * v for v in sizes for s in (1, -1)), math.nan]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def largest(case: RowCase, dtype: torch.dtype) -> float:
    """What the formula in fp64 does not overflow with: in fp64 it would, on its way."""
    most = torch.finfo(dtype).max * (2.0**-16 if dtype is torch.float64 else 1)
    # log p - log t must be a number of the type, also over a temperature
    return most / 16 if case.name == "kl_div_with_logits" else most


def places(case: RowCase, columns: int) -> list[tuple[int, tuple[str, int], tuple[str, int], int]]:
    """Which elements are special, and the target class: the special ones and another."""
    few = [0, 1, columns - 1] if columns <= 3 else [columns // 2, columns - 1]
    elements = list(itertools.product(case.inputs, dict.fromkeys(few)))
    found = []
    for a, b in (*itertools.combinations(elements, 2), *zip(elements, elements, strict=True)):
        classes = sorted({a[1], b[1], 0}) if case.name in CLASSES else [0]
        found += [(a, b, t) for t in classes]
    return found


def rows(
    case: RowCase, values: Tensor, columns: int, variation: Variation, step: int = 11
) -> RowSample:
    """Every pair of values at every pair of places; of long rows one in ``step``."""
    dtype = values.dtype
    pairs = torch.cartesian_prod(torch.arange(len(values)), torch.arange(len(values)))
    if columns > 40:  # a part of them, another in each dtype
        pairs = pairs[DTYPES.index(dtype) :: step]
    where = places(case, columns)
    count = len(pairs) * len(where)
    sample = case.sample((count, columns), dtype, variation, seed=columns)
    rest = sample.tensors
    for k, (a, b, t) in enumerate(where):
        piece = slice(k * len(pairs), (k + 1) * len(pairs))
        for (name, column), which in ((a, 0), (b, 1)):
            rest[name][piece, column] = values[pairs[:, which]]
        if case.name in CLASSES:
            rest["target"][piece] = t
    if case.name == "cosine_embedding_loss":
        rest["target"][::2] = -rest["target"][::2].abs()
    return in_domain(case, sample)


def in_domain(case: RowCase, sample: RowSample) -> RowSample:
    """Without targets that the loss is not for."""
    kept = torch.ones(len(next(iter(sample.tensors.values()))), dtype=torch.bool)
    if case.name in ("multilabel_soft_margin_loss", "dice_loss"):
        shares = case.inputs if case.name == "dice_loss" else ("target",)
        for x in (sample.tensors[name] for name in shares):
            kept &= ~((x < 0) | ((x > 1) & x.isfinite())).any(-1)
    return chosen(sample, kept)


def chosen(sample: RowSample, kept: Tensor) -> RowSample:
    return RowSample({n: t[kept] for n, t in sample.tensors.items()}, sample.options)


def judged(case: RowCase, sample: RowSample) -> Tensor:
    """Which rows have the exact result; of the others it is asked that they are always the same."""
    given = list(sample.tensors.values())
    dtype, kept = given[0].dtype, torch.ones(len(given[0]), dtype=torch.bool)
    sizes = [t.abs().nan_to_num(0, 0, 0).double() for t in given[: len(case.inputs)]]
    if case.name == "cosine_embedding_loss":  # squares are numbers: beyond, torch has NaN as well
        for x in sizes:
            kept &= (x < 1e150).all(-1)
    if case.name == "triplet_margin_loss":  # see test_triplets_farther_apart_than_numbers
        for x, y in itertools.combinations(given, 2):
            infinite = (x.to(computed(dtype)) - y.to(computed(dtype))).isinf()
            kept &= ~(infinite & x.isfinite() & y.isfinite()).any(-1)
    return kept


# ---- what is right -------------------------------------------------------------------------------

#: Loss and gradients of each item in fp64, and the magnitudes of what they are sums of.
Exact = tuple[list[Tensor], list[Tensor]]


class Softmax:
    """p of rows of logits in fp64, by the rules of docs/numerics.md.

    A logit more than 80 (fp64: 700) below the largest, or -inf, has p = 0 exactly. A row without a
    largest finite logit has none: NaN.
    """

    def __init__(self, x: Tensor, scale: float, dtype: torch.dtype) -> None:
        top, index = x.max(-1, keepdim=True)
        self.none = ~top.isfinite().squeeze(-1) | x.isnan().any(-1)
        self.a = (x - top) * scale
        limit = 700.0 if dtype is torch.float64 else 80.0
        self.e = torch.where(self.a < -limit, 0.0, self.a.exp())
        self.rest = self.e.scatter(-1, index, 0.0).sum(-1, keepdim=True)
        self.p = self.e / (1 + self.rest)
        self.log_p = self.a - self.rest.log1p()

    def mean(self, value: Tensor) -> Tensor:
        """Of ``value`` by p; what has no share does not count, whatever it is."""
        return self.times(value).sum(-1, keepdim=True)

    def times(self, value: Tensor) -> Tensor:
        return torch.where(self.p == 0, 0.0, self.p * value)


def focal(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    gamma = sample.options.get("gamma", 2.0 if name == "softmax_focal_loss" else 0.0)
    scale = 1 / sample.options.get("temperature", 1.0)
    x, target = (t for t in sample.tensors.values())
    s, t = Softmax(x, scale, dtype), target.unsqueeze(-1)
    others = s.e.scatter(-1, t, 0.0)
    q = others.sum(-1, keepdim=True) / (1 + s.rest)
    # 1 + rest is rounded; the rest itself is what counts where the target is the largest
    excess = torch.where(s.a.gather(-1, t) == 0, others.sum(-1, keepdim=True), s.rest)
    minus_log = excess.log1p() - s.a.gather(-1, t)
    weight = sample.options.get("weight")
    w = torch.ones_like(q) if weight is None else weight[target].unsqueeze(-1)
    pull = w * scale * q**gamma
    if gamma:
        ratio = torch.where(q == 0, 1.0, minus_log / q)
        pull = pull * (1 + gamma * s.p.gather(-1, t) * ratio)
    grad = (others / (1 + s.rest) * pull).scatter(-1, t, -q * pull)
    loss = w * q**gamma * minus_log
    return blank(s.none, loss.squeeze(-1), grad), [loss * 0, grad]


def blank(none: Tensor, loss: Tensor, *grads: Tensor) -> list[Tensor]:
    """NaN in items whose distribution there is none of."""
    nan = math.nan
    return [loss.masked_fill(none, nan), *(g.masked_fill(none[:, None], nan) for g in grads)]


def pair(sample: RowSample, dtype: torch.dtype) -> tuple[Softmax, Softmax, float]:
    scale = 1 / sample.options.get("temperature", 1.0)
    student, teacher = (Softmax(sample.tensors[n], scale, dtype) for n in ("student", "teacher"))
    return student, teacher, scale


def kl(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    p, t, scale = pair(sample, dtype)
    reverse = sample.options.get("direction") == "reverse"
    if reverse:
        p, t = t, p
    u = t.log_p - p.log_p
    loss = t.mean(u)
    grads = [scale * (p.p - t.p), scale * t.times(u - loss)]
    sizes = [scale * (p.p + t.p), scale * t.times(u.abs() + loss + 1)]
    if reverse:
        grads, sizes = grads[::-1], sizes[::-1]
    exact = blank(p.none | t.none, loss.squeeze(-1), *grads)
    return exact, [t.mean(u.abs() + 1), *sizes]


def js(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    p, t, scale = pair(sample, dtype)
    beta = sample.options.get("beta", 0.5)
    mixture = (beta * t.p + (1 - beta) * p.p).log()
    loss, size, grads, sizes = torch.zeros(1), torch.zeros(1), [], []
    for one, share in ((p, 1 - beta), (t, beta)):
        u = one.log_p - mixture
        own = one.mean(u)
        loss = loss + share * own
        size = size + share * one.mean(u.abs() + 1)
        grads.append(share * scale * one.times(u - own))
        sizes.append(share * scale * one.times(u.abs() + own + 1))
    return blank(p.none | t.none, loss.squeeze(-1), *grads), [size, *sizes]


def tv(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    p, t, scale = pair(sample, dtype)
    sign = (p.p - t.p).sign()
    grads = [f * scale / 2 * one.times(sign - one.mean(sign)) for one, f in ((p, 1), (t, -1))]
    exact = blank(p.none | t.none, (p.p - t.p).abs().sum(-1) / 2, *grads)
    return exact, [torch.ones(1), scale * p.p, scale * t.p]


def entropy(sample: RowSample, dtype: torch.dtype, name: str) -> Exact:
    scale = 1 / sample.options.get("temperature", 1.0)
    s = Softmax(sample.tensors["input"], scale, dtype)
    own = s.mean(-s.a)
    exact = blank(s.none, (s.rest.log1p() + own).squeeze(-1), -scale * s.times(s.a + own))
    return exact, [own * 0, scale * s.times(s.a.abs() + own)]


def by_autograd(
    sample: RowSample, case: RowCase, function: Callable[..., Tensor], dtype: torch.dtype
) -> list[Tensor]:
    wide, leaves = case.leaves(sample.to(dtype))
    loss = function(**wide.tensors, **wide.options)
    grads = torch.autograd.grad(loss.sum(), leaves)
    return [loss.detach().double(), *(g.double() for g in grads)]


SOFTMAXES = {
    "cross_entropy": focal, "softmax_focal_loss": focal, "info_nce_loss": focal,
    "kl_div_with_logits": kl, "js_div_with_logits": js, "tv_distance_with_logits": tv,
    "entropy_with_logits": entropy,
}  # fmt: skip


def in_torch(case: RowCase) -> Callable[..., Tensor]:
    # The slope at a margin differs between versions of torch: see docs/numerics.md
    if case.torch is None or case.name in ("cosine_embedding_loss", "triplet_margin_loss"):
        return lambda **given: case.terms(**given)[0]
    function = case.torch
    return lambda **given: function(**given, reduction="none")


def exact(case: RowCase, sample: RowSample) -> Exact:
    """By torch's function, or by the formula."""
    wide = sample.to(torch.float64)
    dtype = computed(sample.tensors[case.inputs[0]].dtype)
    if case.name in SOFTMAXES:
        want, sizes = SOFTMAXES[case.name](wide, dtype, case.name)
        return want, [s.squeeze(-1) if k == 0 else s for k, s in enumerate(sizes)]
    want = by_autograd(sample, case, in_torch(case), torch.float64)
    if case.name == "multilabel_soft_margin_loss":
        # torch subtracts logarithms of numbers near 1/2, which leaves nothing of a small x
        weight = wide.options.get("weight", 1.0)
        want[2] = -wide.tensors["input"] * weight / wide.tensors["input"].shape[-1]
    if case.size is None:
        return want, [torch.zeros(())] * len(want)
    finite = {n: t.nan_to_num(0, 0, 0) if n in case.inputs else t for n, t in wide.tensors.items()}
    sizes = case.size(**finite, **wide.options)
    return want, [s.detach().nan_to_num(0, 0, 0) for s in sizes]


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
        values = specials(case, dtype, largest(case, dtype))
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


def through_autograd(case: RowCase, sample: RowSample, reduction: str) -> list[Tensor]:
    sample, leaves = case.leaves(sample)
    loss = case.function(**sample.tensors, **sample.options, reduction=reduction)
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(got: list[Tensor], want: list[Tensor], label: str) -> None:
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        assert same_bits(g, w), f"{label}: result {k}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_the_same(case: RowCase) -> None:
    """For every instruction set, entry and layout, and with one gradient only."""
    for variation, dtype, columns in itertools.product(variations(case), DTYPES, COLUMNS):
        sample = rows(case, specials(case, dtype), columns, variation, step=37)
        label = f"{variation.name} {dtype} {columns} columns"
        want = direct(case, sample, reduction="none")
        first = _C.isa()
        for isa in _C.isas():
            if isa != first:
                _C.set_isa(isa)
                assert_same(direct(case, sample, reduction="none"), want, f"{label} {isa}")
        _C.set_isa(first)
        assert_same(through_autograd(case, sample, "none"), want, f"{label}, autograd")
        for k, name in enumerate(case.inputs if len(case.inputs) > 1 else ()):
            one = direct(case, sample, reduction="none", argnums=(name,))
            assert_same(one, [want[0], want[1 + k]], f"{label}, {name} alone")
        total = direct(case, sample, reduction="sum")
        assert_same(total[1:], want[1:], f"{label}, sum")
        assert_same(through_autograd(case, sample, "sum"), total, f"{label}, sum by autograd")
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
        given = rows(case, specials(case, dtype), columns, case.variations[0], step=37)
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
        values = specials(case, dtype, min(largest(case, dtype), 1e30))
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
                    through_autograd(case, part, reduction)[1:], shares, f"{where}, autograd"
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


# ---- by hand -------------------------------------------------------------------------------------


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
