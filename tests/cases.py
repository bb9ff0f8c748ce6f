"""The case list: one row a loss. Tests, benchmarks and the documentation's tables run over it.

A row is a formula, the functions that compute it, a builder of inputs, and the options that it is
tried with. Dtypes, layouts, reductions, reference values and the criterion follow from the row.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mbkern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
COLUMNS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 2049, 5000)

Random = torch.Generator


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, and what is expected of it."""

    input: Tensor
    target: Tensor
    options: dict[str, Any]  # also a third tensor, by its name

    def to(self, dtype: torch.dtype) -> Sample:
        """The same with floating tensors of another dtype."""

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.detach().to(dtype) if floating else value

        options = {name: cast(value) for name, value in self.options.items()}
        return Sample(cast(self.input), cast(self.target), options)


@dataclass(frozen=True, eq=False)
class Variation:
    """A set of options that a loss is tried with; ``torch`` says whether torch has them all."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)  # values, or builders of tensors
    torch: bool = True
    target: Callable[[Sample, Random], Tensor] | None = None  # in place of the case's own


@dataclass(frozen=True, eq=False)
class Case:
    """One loss."""

    name: str  # in mbkern.functional and mbkern.loss_and_grad
    terms: Callable[..., tuple[Tensor, Tensor]]  # formula: losses, weights in the mean
    torch: Callable[..., Tensor] | None  # torch's own function
    module: type[torch.nn.Module]
    torch_module: type[torch.nn.Module] | None
    make: Callable[[tuple[int, ...], Random], tuple[Tensor, Tensor]]  # fp64 input and target
    variations: tuple[Variation, ...]
    differentiable: tuple[str, ...] = ("input",)  # whatever the options; probabilities are besides
    dtypes: tuple[torch.dtype, ...] = DTYPES
    #: A third tensor that the loss cannot do without, as a function of the values of the first: the
    #: functions below take it where it is not given.
    third: Callable[[Tensor], Tensor] | None = None
    #: Where terms cancel: the sums of their magnitudes, in the loss and in each derivative.
    size: Callable[..., tuple[Tensor, ...]] | None = None
    one_shape: bool = False  # refuses to broadcast, as torch does
    torch_broadcasts: bool = True

    def __post_init__(self) -> None:
        if self.torch is not None:
            object.__setattr__(self, "torch", self._filled(self.torch))

    def _filled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """With a third tensor, and a mean, where they are not asked for."""
        third, defaults = self.third, inspect.signature(function).parameters
        if third is None and defaults["reduction"].default == "mean":
            return function

        @functools.wraps(function)
        def filled(*args: Any, **options: Any) -> Tensor:
            if third is not None and len(args) < 3 and self.arguments[2] not in options:
                options[self.arguments[2]] = third(args[0])
            return function(*args, **{"reduction": "mean", **options})

        return filled

    @property
    def function(self) -> Callable[..., Tensor]:
        return self._filled(getattr(mbkern.functional, self.name))

    @property
    def arguments(self) -> tuple[str, ...]:
        return next(loss.arguments for loss in mbkern.losses() if loss.name == self.name)

    @property
    def has_rows(self) -> bool:
        return next(loss.kind for loss in mbkern.losses() if loss.name == self.name) == "row"

    def tensors(self, sample: Sample) -> dict[str, Tensor]:
        """The loss's tensors of a sample, by name, without one that it can do without."""
        given = sample.options.get(self.arguments[2]) if len(self.arguments) > 2 else None
        tensors = (sample.input, sample.target, given)
        return {n: t for n, t in zip(self.arguments, tensors, strict=False) if t is not None}

    def leaves(self, sample: Sample) -> tuple[Sample, dict[str, Tensor]]:
        """The sample with leaves that require grad in it, and these by name."""
        leaves = {
            name: tensor.detach().requires_grad_()
            for name, tensor in self.tensors(sample).items()
            if name in self.differentiable or (self.has_rows and tensor.is_floating_point())
        }
        first, second, *rest = self.arguments
        options = sample.options | {name: leaves[name] for name in rest if name in leaves}
        input, target = leaves.get(first, sample.input), leaves.get(second, sample.target)
        return Sample(input, target, options), leaves

    def sample(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        variation: Variation | None = None,
        seed: int = 0,
    ) -> Sample:
        """Seeded arguments for an input of this shape, rounded to ``dtype``."""
        random = torch.Generator().manual_seed(seed)
        sample = Sample(*self.make(shape, random), {})
        if variation is not None:
            if variation.target is not None:
                sample = replace(sample, target=variation.target(sample, random))
            built = variation.options.items()
            options = {k: v(sample, random) if callable(v) else v for k, v in built}
            sample = replace(sample, options=options)
        sample = sample.to(dtype)
        if self.third is not None and self.arguments[2] not in sample.options:
            sample.options[self.arguments[2]] = self.third(sample.input)
        return sample

    def leaf(self, dtype: torch.dtype, shape: tuple[int, ...] = (6, 70)) -> tuple[Tensor, Tensor]:
        """Input, with requires_grad, and target of a plain call."""
        sample = self.sample(shape, dtype)
        return sample.input.requires_grad_(), sample.target

    def sizes(self, sample: Sample, incoming: Tensor, reduction: str = "mean") -> tuple[float, ...]:
        """The largest sum of magnitudes in the result and in each gradient, of an fp64 sample."""
        if self.size is None or sample.input.numel() == 0 or incoming.numel() == 0:
            return (0.0,) * 4
        options = dict(sample.options)
        weights = [options.pop(name, None) for name in ("weight", "sample_weight")]
        options.pop("denominator", None)
        loss, *slopes = self.size(sample.input, sample.target, **options)
        loss, *slopes = torch.broadcast_tensors(loss, *slopes)
        factor = torch.ones_like(loss)
        for weight in weights:
            factor = factor if weight is None else factor * weight
        if reduction == "mean":
            factor = factor / (loss.numel() if weights[1] is None else factor.sum())
        sizes = [loss * factor if reduction == "none" else (loss * factor).sum()]
        for slope, tensor in zip(slopes, self.tensors(sample).values(), strict=False):
            sizes.append((slope * factor * incoming.abs()).sum_to_size(tensor.shape))
        return tuple(float(size.max()) for size in sizes)

    def exact(self, x: Tensor, target: Tensor, /, **options: Any) -> tuple[Tensor, Tensor]:
        """The fp64 reference loss, and the fp64 leaf that it is a function of."""
        wide = x.detach().double().requires_grad_()
        target = target.double() if target.is_floating_point() else target
        return self.reference(wide, target, **options), wide

    def reference(
        self,
        input: Tensor,
        target: Tensor,
        /,
        *,
        reduction: str = "mean",
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The formula, differentiable, in the precision of its arguments."""
        if self.third is not None and self.arguments[2] not in options:
            options[self.arguments[2]] = self.third(input)
        losses, weights = self.terms(input, target, **options)
        if sample_weight is not None:
            losses, weights = losses * sample_weight, weights * sample_weight
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / (weights.sum() if denominator is None else denominator)


# ---- the criterion -------------------------------------------------------------------------------


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance (fp64) between neighbours of ``dtype`` at |x|: one ulp."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.tiny))
    return info.eps * torch.exp2(exponent.double() - 1)


#: Error before the rounding to the result's dtype, in eps of the type computed in, times the
#: largest value of the tensor. A term exp(-d) has (d/2 + 1) exp(-d) <= 1.1 eps of the largest, from
#: the rounded distance and from exp; the sums (a tree), products and divisions after it add half an
#: eps each. For fp64 the reference has no more digits than the kernel, and both sum in order.
ARITHMETIC = {torch.float32: 8.0, torch.float64: 24.0}


def check(
    got: Tensor, want: Tensor, stock: Tensor | None, label: str, magnitude: float = 0.0
) -> None:
    """Compare a tensor with its fp64 reference.

    Max and RMS error must be at most those of ``stock`` (torch in the same dtype; None: torch has
    no such option) plus one ulp of the largest value. Whatever torch does, each element must be
    what computing in fp32 (fp64) and rounding once gives: within half an ulp of it, and ARITHMETIC.
    That is all for fp64, where the reference is no better than torch: it has subtracted numbers of
    ``magnitude``.
    """
    assert got.shape == want.shape, f"{label}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if stock is not None:
        assert got.dtype is stock.dtype, f"{label}: dtype {got.dtype}, torch's is {stock.dtype}"
    want = want.detach().double()
    value = got.detach().double()
    rounded = want.to(got.dtype).double()
    want = torch.where(rounded.isinf(), rounded, want)
    finite = want.isfinite()
    if not finite.all():
        odd = (value == want) | (value.isnan() & want.isnan())
        assert odd[~finite].all(), f"{label}: {got} is not {want}"
        value, want = value[finite], want[finite]
    if value.numel() == 0:
        return
    error = (value - want).abs()
    largest = want.abs().max().clamp(min=magnitude)
    compute = torch.float64 if got.dtype is torch.float64 else torch.float32
    once = 0.5 * spacing(want, got.dtype) + ARITHMETIC[compute] * torch.finfo(compute).eps * largest
    excess = (error / once).nan_to_num().max()
    assert (error <= once).all(), f"{label}: {excess:.3g} times the error of one rounding"
    if stock is None or got.dtype is torch.float64:
        return
    theirs = (stock.detach().double()[finite] - want.flatten()).abs()
    ulp = spacing(largest, got.dtype).item()
    for name, mine, bound in (
        ("max", error.max(), theirs.max()),
        ("RMS", error.square().mean().sqrt(), theirs.square().mean().sqrt()),
    ):
        if not bound.isfinite():  # torch's own has overflowed
            continue
        assert mine <= bound + ulp, f"{label}: {name} {mine:.4g}, torch {bound:.4g}, ulp {ulp:.4g}"


# ---- cross-entropy -------------------------------------------------------------------------------


def _cross_entropy_terms(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    x = input.movedim(1, -1) if input.dim() > 1 else input
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    classes = x.shape[-1]
    w = torch.ones(classes, dtype=x.dtype) if weight is None else weight
    if target.is_floating_point():
        share = target.movedim(1, -1) if input.dim() > 1 else target
        kept = torch.ones(x.shape[:-1], dtype=torch.bool)
        weights = kept.to(x.dtype)
    else:
        kept = target.long() != ignore_index
        index = torch.where(kept, target.long(), 0)
        share = F.one_hot(index, classes).to(x.dtype)
        weights = w[index] * kept
    q = w * ((1 - label_smoothing) * share + label_smoothing / classes)
    lse = x.logsumexp(-1)
    losses = (q * (lse.unsqueeze(-1) - x)).sum(-1) + z_loss * lse**2
    return torch.where(kept, losses, 0), weights


def _logits(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    columns = shape[1] if len(shape) > 1 else shape[0]
    items = shape[:1] + shape[2:] if len(shape) > 1 else ()
    logits = 3 * torch.randn(shape, generator=random, dtype=torch.float64)
    return logits, torch.randint(columns, items, generator=random)


def _class_weight(sample: Sample, random: Random) -> Tensor:
    columns = sample.input.shape[1 if sample.input.dim() > 1 else 0]
    return torch.rand(columns, generator=random, dtype=torch.float64) + 0.25


def _item_weight(sample: Sample, random: Random) -> Tensor:
    shape = sample.input.shape
    items = shape[:1] + shape[2:] if len(shape) > 1 else torch.Size()
    return torch.rand(items, generator=random, dtype=torch.float64) + 0.25


def _some_ignored(sample: Sample, random: Random) -> Tensor:
    ignored = torch.rand(sample.target.shape, generator=random) < 0.3
    return torch.where(ignored, -100, sample.target)


def _none_left(sample: Sample, random: Random) -> Tensor:
    return torch.full_like(sample.target, -100)


def _probabilities(sample: Sample, random: Random) -> Tensor:
    scores = torch.randn(sample.input.shape, generator=random, dtype=torch.float64)
    return scores.softmax(1 if scores.dim() > 1 else 0)


_EVERYTHING = {
    "weight": _class_weight,
    "sample_weight": _item_weight,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "softcap": 5.0,
}
_SMOOTHED = {"weight": _class_weight, "label_smoothing": 0.2}
_CROSS_ENTROPY = (
    Variation("plain"),
    Variation("weight", {"weight": _class_weight}),
    Variation("smoothing", {"label_smoothing": 0.1}),
    Variation("ignored", target=_some_ignored),
    Variation("all ignored", target=_none_left),
    Variation("ignored class", {"ignore_index": 0, "label_smoothing": 0.1}),
    Variation("weight, smoothing, ignored", _SMOOTHED, target=_some_ignored),
    Variation("probabilities", target=_probabilities),
    Variation("weighted probabilities", _SMOOTHED, target=_probabilities),
    Variation("z-loss", {"z_loss": 1e-2}, torch=False),
    Variation("soft cap", {"softcap": 5.0}, torch=False),
    Variation("sample weight", {"sample_weight": _item_weight}, torch=False),
    Variation("everything", _EVERYTHING, torch=False, target=_some_ignored),
    Variation("everything, probabilities", _EVERYTHING, torch=False, target=_probabilities),
)


# ---- element-wise losses -------------------------------------------------------------------------


def elements(
    formula: Callable[..., Tensor], weight_counts: bool = False
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The terms of an element-wise loss, whose ``weight`` counts in the mean or only rescales."""

    def terms(
        input: Tensor, target: Tensor, /, *, weight: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        losses = formula(input, target, **options)
        ones = torch.ones_like(losses)
        if weight is None:
            return losses, ones
        return losses * weight, weight * ones if weight_counts else ones

    return terms


def _of_torch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def formula(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return function(*torch.broadcast_tensors(input, target), reduction="none", **options)

    return formula


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # torch's softplus is x from 20 on


def _log_cosh(input: Tensor, target: Tensor) -> Tensor:
    r = (input - target).abs()
    exact = r + torch.log1p(torch.exp(-2 * r)) - math.log(2)
    near = torch.log1p(2 * torch.sinh(r.clamp(max=1) / 2) ** 2)
    return torch.where(r < 0.5, near, exact)


def _quantile(input: Tensor, target: Tensor, quantile: float = 0.5) -> Tensor:
    r = target - input  # at 0 the gradient is 0
    below = torch.where(r < 0, (quantile - 1) * r, 0 * r)
    return torch.where(r > 0, quantile * r, below)


def _focal(input: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    p = torch.sigmoid(input)
    ce = target * _softplus(-input) + (1 - target) * _softplus(input)
    loss = (p * (1 - target) + torch.sigmoid(-input) * target) ** gamma * ce
    return loss if alpha < 0 else (alpha * target + (1 - alpha) * (1 - target)) * loss


def _tweedie(
    input: Tensor, target: Tensor, power: float = 1.5, log_input: bool = True, eps: float = 1e-8
) -> Tensor:
    mean = input.exp() if log_input else input.clamp(min=eps)
    logarithm = input if log_input else mean.log()
    first = -logarithm if power == 1 else mean ** (1 - power) / (power - 1)
    return target * first + (logarithm if power == 2 else mean ** (2 - power) / (2 - power))


def _gaussian(
    input: Tensor, target: Tensor, var: Tensor, full: bool = False, eps: float = 1e-6
) -> Tensor:
    var = var + (var.detach().clamp(min=eps) - var.detach())
    losses = 0.5 * (var.log() + (input - target) ** 2 / var)
    return losses + 0.5 * math.log(2 * math.pi) if full else losses


# Sums of the magnitudes of what cancels, in the loss and in the derivative by each argument.


def _hinge_size(x: Tensor, y: Tensor, margin: float = 1.0) -> tuple[Tensor, ...]:
    return abs(margin) + (x * y).abs(), y.abs(), x.abs()


def _squared_hinge_size(x: Tensor, y: Tensor, margin: float = 1.0) -> tuple[Tensor, ...]:
    size = abs(margin) + (x * y).abs()
    return size**2, 2 * size * y.abs(), 2 * size * x.abs()


def _embedding_size(x: Tensor, y: Tensor, margin: float = 1.0) -> tuple[Tensor, ...]:
    return abs(margin) + x.abs(), torch.ones_like(x)


def _ranking_size(x: Tensor, y: Tensor, target: Tensor, margin: float = 0.0) -> tuple[Tensor, ...]:
    r = (x - y).abs()
    return abs(margin) + r * target.abs(), target.abs(), target.abs(), r


def _focal_size(
    x: Tensor, y: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> tuple[Tensor, ...]:
    s, rest, no = torch.sigmoid(x), torch.sigmoid(-x), 1 - y
    ce, q = y * _softplus(-x) + no * _softplus(x), s * no + rest * y
    slope = gamma * q ** (gamma - 1)
    a = torch.ones_like(y) if alpha < 0 else alpha * y + (1 - alpha) * no
    power = q**gamma * (1 + abs(gamma - 1) * q.log().abs())  # of a rounded logarithm
    d_input = a * (power * (no * s + y * rest) + slope * s * rest * ce)
    return a * power * ce, d_input, power * ce + a * (slope * ce + power * x.abs())


def _kl_size(x: Tensor, y: Tensor, log_target: bool = False) -> tuple[Tensor, ...]:
    p, logarithm = (y.exp(), y) if log_target else (y, y.log())
    size = logarithm.abs() + x.abs()
    return p * size, p, (p if log_target else 1) * (size + 1)


def _poisson_size(x: Tensor, y: Tensor, full: bool = False) -> tuple[Tensor, ...]:
    rate, logarithm = x.exp(), y.clamp(min=1).log() * full
    return rate + (y * x).abs() + (y + 1) * (logarithm + full), rate + y, x.abs() + logarithm + full


def _gaussian_size(
    x: Tensor, y: Tensor, var: Tensor, full: bool = False, eps: float = 1e-6
) -> tuple[Tensor, ...]:
    slope = (x - y).abs() / var
    loss = (var.log().abs() + slope * (x - y).abs()) / 2 + full
    # The residual is rounded before it is squared, so its error counts twice more.
    return loss, slope, slope, (1 / var + 3 * slope**2) / 2


def _tweedie_size(x: Tensor, y: Tensor, power: float = 1.5) -> tuple[Tensor, ...]:
    a, b = ((1 - power) * x).exp(), ((2 - power) * x).exp()
    first = x.abs() if power == 1 else a / abs(power - 1)
    return y * first + (x.abs() if power == 2 else b / abs(2 - power)), y * a + b, first


def _pair(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    pair = torch.randn((2, *shape), generator=random, dtype=torch.float64)
    return pair[0], pair[1]


def _uniform(shape: tuple[int, ...], random: Random) -> Tensor:
    return torch.rand(shape, generator=random, dtype=torch.float64)


def _fractions(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    return 0.05 + 0.9 * _uniform(shape, random), _uniform(shape, random)


def _scored(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    scores = 3 * torch.randn(shape, generator=random, dtype=torch.float64)
    return scores, _uniform(shape, random)


def _signed(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    scores, chance = _scored(shape, random)
    return scores, torch.where(chance < 0.5, -1.0, 1.0)


def _counts(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    rates = torch.randn(shape, generator=random, dtype=torch.float64)
    return rates, torch.floor(6 * _uniform(shape, random))


def _positive_counts(sample: Sample, random: Random) -> Tensor:
    return sample.target + 0.5  # at 0 torch's gradient by the target is NaN with ``full``


def _some_variance(x: Tensor) -> Tensor:
    return x.detach().abs().clamp(0.5, 4)


def _some_signs(x: Tensor) -> Tensor:
    return torch.where(x.detach() < 0.25, -1.0, 1.0).to(x.dtype)


def _log_probabilities(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    return -4 * _uniform(shape, random), 0.05 + _uniform(shape, random)


def _element_weight(sample: Sample, random: Random) -> Tensor:
    return _uniform(tuple(sample.input.shape), random) + 0.25


def _signs(sample: Sample, random: Random) -> Tensor:
    chance = _uniform(tuple(sample.input.shape), random)
    return torch.where(chance < 0.5, -1.0, 1.0)


_SAMPLE_WEIGHT = {"sample_weight": _element_weight}
_SAMPLES = (Variation("sample weight", _SAMPLE_WEIGHT, torch=False),)
_POINTWISE = (Variation("plain"), *_SAMPLES)
_WEIGHTED = (
    Variation("weight", {"weight": _element_weight}),
    Variation("both weights", {"weight": _element_weight, **_SAMPLE_WEIGHT}, torch=False),
)


def _with(torch_has: bool, **named: dict[str, Any]) -> tuple[Variation, ...]:
    """A variation for each set of options, by its name."""
    return tuple(
        Variation(name.replace("_", " "), options, torch=torch_has)
        for name, options in named.items()
    )


_BOTH = ("input", "target")


# ---- the list ------------------------------------------------------------------------------------

CASES = (
    Case(
        "cross_entropy", _cross_entropy_terms, F.cross_entropy,
        mbkern.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss, _logits, _CROSS_ENTROPY,
    ),
    Case(
        "mse_loss", elements(lambda x, y: (x - y) ** 2, True), F.mse_loss,
        mbkern.nn.MSELoss, torch.nn.MSELoss, _pair, _POINTWISE + _WEIGHTED, _BOTH,
    ),
    Case(
        "half_squared_error", elements(lambda x, y: (x - y) / 2 * (x - y)), None,
        mbkern.nn.HalfSquaredError, None, _pair, _POINTWISE, _BOTH,
    ),
    Case(
        "l1_loss", elements(lambda x, y: (x - y).abs(), True), F.l1_loss,
        mbkern.nn.L1Loss, torch.nn.L1Loss, _pair, _POINTWISE + _WEIGHTED, _BOTH,
    ),
    Case(
        "smooth_l1_loss", elements(_of_torch(F.smooth_l1_loss)), F.smooth_l1_loss,
        mbkern.nn.SmoothL1Loss, torch.nn.SmoothL1Loss, _pair,
        _POINTWISE + _with(True, narrow={"beta": 0.3}), _BOTH,
    ),
    Case(
        "huber_loss", elements(_of_torch(F.huber_loss)), F.huber_loss,
        mbkern.nn.HuberLoss, torch.nn.HuberLoss, _pair,
        _POINTWISE + _WEIGHTED + _with(True, narrow={"delta": 0.3}), _BOTH,
    ),
    Case(
        "log_cosh_loss", elements(_log_cosh), None,
        mbkern.nn.LogCoshLoss, None, _pair, _POINTWISE, _BOTH,
    ),
    Case(
        "quantile_loss", elements(_quantile), None,
        mbkern.nn.QuantileLoss, None, _pair,
        _POINTWISE + _with(False, upper={"quantile": 0.9}), _BOTH,
    ),
    Case(
        "binary_cross_entropy", elements(_of_torch(F.binary_cross_entropy)), F.binary_cross_entropy,
        mbkern.nn.BCELoss, torch.nn.BCELoss, _fractions, _POINTWISE + _WEIGHTED, _BOTH,
        one_shape=True,
    ),
    Case(
        "binary_cross_entropy_with_logits", elements(_of_torch(F.binary_cross_entropy_with_logits)),
        F.binary_cross_entropy_with_logits,
        mbkern.nn.BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss, _scored,
        _POINTWISE + _WEIGHTED + _with(True, positive={"pos_weight": _element_weight}), _BOTH,
        one_shape=True,
    ),
    Case(
        "sigmoid_focal_loss", elements(_focal), None,
        mbkern.nn.SigmoidFocalLoss, None, _scored,
        _POINTWISE + _with(
            False, unweighted={"alpha": -1.0}, soft={"gamma": 0.5}, linear={"gamma": 1.0},
            none={"gamma": 0.0}, steep={"gamma": 3.0},
        ), _BOTH, size=_focal_size,
    ),
    Case(
        "soft_margin_loss", elements(lambda x, y: _softplus(-y * x)), F.soft_margin_loss,
        mbkern.nn.SoftMarginLoss, torch.nn.SoftMarginLoss, _signed, _POINTWISE,
        torch_broadcasts=False,
    ),
    Case(
        "hinge_embedding_loss", elements(_of_torch(F.hinge_embedding_loss)),
        F.hinge_embedding_loss, mbkern.nn.HingeEmbeddingLoss, torch.nn.HingeEmbeddingLoss, _signed,
        _POINTWISE + _with(True, narrow={"margin": 0.5}), size=_embedding_size,
    ),
    Case(
        "hinge_loss", elements(lambda x, y, margin=1.0: (margin - y * x).clamp_min(0)), None,
        mbkern.nn.HingeLoss, None, _signed, _POINTWISE + _with(False, wide={"margin": 2.0}), _BOTH,
        size=_hinge_size,
    ),
    Case(
        "squared_hinge_loss",
        elements(lambda x, y, margin=1.0: (margin - y * x).clamp_min(0) ** 2), None,
        mbkern.nn.SquaredHingeLoss, None, _signed, _POINTWISE + _with(False, wide={"margin": 2.0}),
        _BOTH, size=_squared_hinge_size,
    ),
    Case(
        "margin_ranking_loss", elements(
            lambda x, y, target, margin=0.0: (margin - target * (x - y)).clamp_min(0)
        ), F.margin_ranking_loss, mbkern.nn.MarginRankingLoss, torch.nn.MarginRankingLoss, _pair,
        _with(True, plain={"target": _signs}, margin={"target": _signs, "margin": 0.5})
        + _with(False, sample_weight={"target": _signs, **_SAMPLE_WEIGHT}),
        ("input1", "input2", "target"), third=_some_signs, size=_ranking_size,
        torch_broadcasts=False,
    ),
    Case(
        "kl_div", elements(_of_torch(F.kl_div)), F.kl_div,
        mbkern.nn.KLDivLoss, torch.nn.KLDivLoss, _log_probabilities,
        _POINTWISE + _with(True, logarithmic={"log_target": True}), _BOTH, size=_kl_size,
    ),
    Case(
        "poisson_nll_loss", elements(_of_torch(F.poisson_nll_loss)), F.poisson_nll_loss,
        mbkern.nn.PoissonNLLLoss, torch.nn.PoissonNLLLoss, _counts,
        (*_POINTWISE, Variation("full", {"full": True}, target=_positive_counts)), _BOTH,
        size=_poisson_size,
    ),
    Case(
        "gaussian_nll_loss", elements(_gaussian), F.gaussian_nll_loss,
        mbkern.nn.GaussianNLLLoss, torch.nn.GaussianNLLLoss, _pair,
        _with(True, plain={"var": _element_weight}, full={"var": _element_weight, "full": True})
        + _with(False, sample_weight={"var": _element_weight, **_SAMPLE_WEIGHT}),
        ("input", "target", "var"), third=_some_variance, size=_gaussian_size,
    ),
    Case(
        "tweedie_nll_loss", elements(_tweedie), None,
        mbkern.nn.TweedieNLLLoss, None, _counts,
        _POINTWISE + _with(
            False, poisson={"power": 1.0}, gamma={"power": 2.0}, gaussian={"power": 0.0},
        ), _BOTH, size=_tweedie_size,
    ),
)  # fmt: skip
