"""What is known of a loss of rows of several tensors, as ``case`` has for the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from case import reduced
from torch import Tensor

import mbkern

Random = torch.Generator
Tensors = dict[str, Tensor]
Terms = tuple[Tensor, Tensor]  # losses, weights in the mean


@dataclass(frozen=True, eq=False)
class Variation:
    """A set of options; ``torch`` says whether torch has them all."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)  # values, or builders of tensors
    torch: bool = True


@dataclass(frozen=True)
class RowSample:
    """Arguments of one call, all by name."""

    tensors: Tensors
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> RowSample:
        """The same with floating tensors of another dtype."""

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.detach().to(dtype) if floating else value

        both = ({k: cast(v) for k, v in d.items()} for d in (self.tensors, self.options))
        return RowSample(*both)

    def of(self, **tensors: Tensor) -> RowSample:
        """With other tensors."""
        return replace(self, tensors=self.tensors | tensors)

    def part(self, piece: slice) -> RowSample:
        """Some of the items."""
        per_item = ("sample_weight", "target")
        options = {k: v[piece] if k in per_item else v for k, v in self.options.items()}
        return RowSample({k: v[piece] for k, v in self.tensors.items()}, options)


@dataclass(frozen=True, eq=False)
class RowCase:
    """One loss."""

    name: str  # in mbkern.functional
    inputs: tuple[str, ...]  # the differentiable tensors
    terms: Callable[..., Terms]
    torch: Callable[..., Tensor] | None
    module: type[torch.nn.Module]
    make: Callable[[tuple[int, ...], Random], Tensors]
    variations: tuple[Variation, ...]
    images: bool = False  # takes (N, C, d1, ...)
    #: Where terms cancel: the sums of their magnitudes, in the losses and in each gradient.
    size: Callable[..., tuple[Tensor, ...]] | None = None
    registered: bool = True

    @property
    def function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(mbkern.functional, self.name)
        return function

    def sample(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        variation: Variation | None = None,
        seed: int = 0,
    ) -> RowSample:
        """Seeded arguments, rounded to ``dtype``."""
        random = torch.Generator().manual_seed(seed)
        sample = RowSample(self.make(shape, random), {})
        built = (variation or self.variations[0]).options.items()
        options = {k: v(sample, random) if callable(v) else v for k, v in built}
        if "target" in options and "target" in sample.tensors:
            sample = sample.of(target=options.pop("target"))
        return replace(sample, options=options).to(dtype)

    def leaves(self, sample: RowSample) -> tuple[RowSample, list[Tensor]]:
        """The sample with leaves that require grad in it, and these."""
        leaves = {n: sample.tensors[n].detach().requires_grad_() for n in self.inputs}
        return sample.of(**leaves), list(leaves.values())

    def reference(
        self,
        *,
        reduction: str = "mean",
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """The formula, called as the function is."""
        terms = self.terms(**self._rows(given))
        return reduced(*terms, reduction, sample_weight, denominator)

    def _rows(self, given: dict[str, Any]) -> dict[str, Any]:
        """The tensors with their columns last."""
        many = (*self.inputs, *(["target"] if "multilabel" in self.name else []))
        if self.name == "dice_loss":
            return {k: v.flatten(1) if k in many else v for k, v in given.items()}
        columns = {n: given[n].movedim(1, -1) for n in many if n in given and given[n].dim() > 1}
        return given | columns

    def sizes(self, sample: RowSample, incoming: Tensor, reduction: str) -> tuple[float, ...]:
        """The largest sum of magnitudes in the result and in each gradient, of an fp64 sample."""
        # Terms of a softmax below e^-80 are 0 (core/math.h): 80 e^-80 an eps of this at the most.
        least = 1e-26 if any("temperature" in v.options for v in self.variations) else 0.0
        if self.size is None or 0 in (incoming.numel(), sample.tensors[self.inputs[0]].numel()):
            return (least,) * 4
        options = dict(sample.options)
        item, divisor = options.pop("sample_weight", None), options.pop("denominator", None)
        given = self._rows(sample.tensors | options)
        losses, *slopes = self.size(**given)
        _, weights = self.terms(**given)
        factor = torch.ones_like(losses) if item is None else item.expand(losses.shape)
        if reduction == "mean":
            factor = factor / ((weights * factor).sum() if divisor is None else divisor)
        total = losses * factor if reduction == "none" else (losses * factor).sum()
        scale = (factor * incoming.abs()).unsqueeze(-1)
        every = (total, *(slope * scale for slope in slopes))
        return tuple(max(least, float(x.detach().nan_to_num(0, 0).max())) for x in every)
