"""The case list: one row a loss. Tests, benchmarks and the documentation's tables run over it.

A row is a formula, the functions that compute it, a builder of inputs, and the options that it is
tried with. Dtypes, layouts, reductions, reference values and the criterion follow from the row.
"""

from __future__ import annotations

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
    options: dict[str, Any]

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

    @property
    def function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(mbkern.functional, self.name)
        return function

    @property
    def has_rows(self) -> bool:
        return next(loss.kind for loss in mbkern.losses() if loss.name == self.name) == "row"

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
        return sample.to(dtype)

    def leaf(self, dtype: torch.dtype, shape: tuple[int, ...] = (6, 70)) -> tuple[Tensor, Tensor]:
        """Input, with requires_grad, and target of a plain call."""
        sample = self.sample(shape, dtype)
        return sample.input.requires_grad_(), sample.target

    def exact(self, x: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The fp64 reference loss, and the fp64 leaf that it is a function of."""
        wide = x.detach().double().requires_grad_()
        target = target.double() if target.is_floating_point() else target
        return self.reference(wide, target, **options), wide

    def reference(
        self,
        input: Tensor,
        target: Tensor,
        *,
        reduction: str = "mean",
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The formula, differentiable, in the precision of its arguments."""
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


def _mse_terms(
    input: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    losses = (input - target) ** 2
    weights = torch.ones_like(losses) if weight is None else weight
    return losses * weights, weights


def _half_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    losses = (input - target) ** 2 / 2
    return losses, torch.ones_like(losses)


def _pair(shape: tuple[int, ...], random: Random) -> tuple[Tensor, Tensor]:
    pair = torch.randn((2, *shape), generator=random, dtype=torch.float64)
    return pair[0], pair[1]


def _element_weight(sample: Sample, random: Random) -> Tensor:
    return torch.rand(sample.input.shape, generator=random, dtype=torch.float64) + 0.25


_SAMPLE_WEIGHT = {"sample_weight": _element_weight}
_POINTWISE = (Variation("plain"), Variation("sample weight", _SAMPLE_WEIGHT, torch=False))
_WEIGHTED = (
    Variation("weight", {"weight": _element_weight}),
    Variation("both weights", {"weight": _element_weight, **_SAMPLE_WEIGHT}, torch=False),
)


# ---- the list ------------------------------------------------------------------------------------

CASES = (
    Case(
        "cross_entropy", _cross_entropy_terms, F.cross_entropy,
        mbkern.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss, _logits, _CROSS_ENTROPY,
    ),
    Case(
        "mse_loss", _mse_terms, F.mse_loss,
        mbkern.nn.MSELoss, torch.nn.MSELoss, _pair, _POINTWISE + _WEIGHTED, ("input", "target"),
    ),
    Case(
        "half_squared_error", _half_terms, None,
        mbkern.nn.HalfSquaredError, None, _pair, _POINTWISE, ("input", "target"),
    ),
)  # fmt: skip
