"""What a row of the case list is, and the criterion that results are held to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import mbkern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
COLUMNS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 2049, 5000)

Random = torch.Generator


def ramp(x: Tensor) -> Tensor:
    """max(x, 0), whose slope at 0 is 1, as that of torch's clamp until 2.13; then that is 0. At NaN
    it is 0."""
    return torch.where(x >= 0, x, x.detach().clamp_min(0))


def reduced(
    losses: Tensor,
    weights: Tensor,
    reduction: str,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The result of a loss: ``weights`` are those of its terms in the mean."""
    if sample_weight is not None:
        losses, weights = losses * sample_weight, weights * sample_weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (weights.sum() if denominator is None else denominator)


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
        terms = self.terms(input, target, **options)
        return reduced(*terms, reduction, sample_weight, denominator)


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
