"""The list of losses of rows of several tensors: one row a loss, as ``cases`` has for the others.

A row is a formula in fp64, torch's function, a builder of its tensors by name, and the options it
is tried with. In formulas the columns are the last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from case import ramp
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
        losses, weights = self.terms(**self._rows(given))
        if sample_weight is not None:
            losses, weights = losses * sample_weight, weights * sample_weight
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / (weights.sum() if denominator is None else denominator)

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


# ---- formulas ------------------------------------------------------------------------------------


def _plain(losses: Tensor) -> Terms:
    return losses, torch.ones_like(losses)


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _kept(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    kept = target.long() != ignore_index
    return kept, torch.where(kept, target.long(), 0)


def _nll(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100
) -> Terms:
    kept, index = _kept(target, ignore_index)
    w = kept.to(input.dtype) if weight is None else weight[index] * kept
    return torch.where(kept, -_at(input, index) * w, 0), w


def _multi_margin(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None
) -> Terms:
    t = target.long()
    others = torch.arange(input.shape[-1]) != t.unsqueeze(-1)
    terms = torch.relu(margin - _at(input, t).unsqueeze(-1) + input) ** p
    losses = torch.where(others, terms, 0).sum(-1) / input.shape[-1]
    return _plain(losses if weight is None else losses * weight[t])


def _multi_margin_size(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    t = target.long()
    z = abs(margin) + _at(input, t).abs().unsqueeze(-1) + input.abs()
    w = (1 if weight is None else weight[t]) / input.shape[-1]
    return (z**p).sum(-1) * w, (p * z ** (p - 1)).sum(-1, keepdim=True) * torch.as_tensor(
        w, dtype=z.dtype
    ).unsqueeze(-1)


def _multilabel_margin(input: Tensor, target: Tensor) -> Terms:
    listed = (target >= 0).long().cumprod(-1).bool()
    count = int(listed.sum(-1).max()) if listed.numel() else 0
    wanted = torch.zeros_like(input).scatter_add(
        -1, torch.where(listed, target, 0).long(), listed.to(input.dtype)
    )
    losses = 0 * input.sum(-1)
    for k in range(count):
        x = _at(input, torch.where(listed, target, 0)[..., k].long())
        terms = torch.relu(1 - x.unsqueeze(-1) + input)
        counts = listed[..., k].unsqueeze(-1) & (wanted == 0)
        losses = losses + torch.where(counts, terms, 0).sum(-1)
    return _plain(losses / input.shape[-1])


def _multilabel_margin_size(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    losses, _ = _multilabel_margin(input, target)
    count = (target >= 0).long().cumprod(-1).sum(-1)
    largest = input.abs().amax(-1)
    return losses + count * (1 + 2 * largest), torch.zeros_like(input)  # whole numbers


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _multilabel_soft_margin(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Terms:
    terms = target * _softplus(-input) + (1 - target) * _softplus(input)
    return _plain((terms if weight is None else terms * weight).mean(-1))


def _multilabel_soft_margin_size(
    input: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    w = (torch.ones_like(input) if weight is None else weight) / input.shape[-1]
    losses, _ = _multilabel_soft_margin(input, target, weight)
    return losses, w * (torch.sigmoid(input) + target), w * input.abs()


def _cosine(input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0) -> Terms:
    a, b = (x.square().sum(-1) + 1e-12 for x in (input1, input2))
    cosine = (input1 * input2).sum(-1) / (a * b).sqrt()
    far = torch.where(target == -1, ramp(cosine - margin), 0)
    return _plain(torch.where(target == 1, 1 - cosine, far))


def _cosine_size(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0
) -> tuple[Tensor, ...]:
    a, b = ((x.square().sum(-1) + 1e-12).sqrt().unsqueeze(-1) for x in (input1, input2))
    x, y = input1.abs() / a, input2.abs() / b
    cosine = (x * y).sum(-1, keepdim=True)
    return 1 + abs(margin) + cosine.squeeze(-1), (y + x * cosine) / a, (x + y * cosine) / b


def _triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    eps: float = 1e-6,
    swap: bool = False,
) -> Terms:
    near, far = ((anchor - x + eps).norm(dim=-1) for x in (positive, negative))
    if swap:
        far = torch.minimum(far, (positive - negative + eps).norm(dim=-1))
    return _plain(ramp(margin + near - far))


def _triplet_size(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    eps: float = 1e-6,
    swap: bool = False,
) -> tuple[Tensor, ...]:
    def unit(x: Tensor, y: Tensor) -> Tensor:
        length = (x - y + eps).norm(dim=-1, keepdim=True)
        return torch.where(length > 0, (x.abs() + y.abs()) / length, 0)

    near, far = ((anchor - x + eps).norm(dim=-1) for x in (positive, negative))
    p, n = unit(anchor, positive), unit(anchor, negative)
    between = unit(positive, negative) if swap else torch.zeros_like(p)
    return abs(margin) + near + far, p + n, p + between, n + between


def _dice(input: Tensor, target: Tensor, smooth: float = 1.0) -> Terms:
    over = input.sum(-1) + target.sum(-1) + smooth
    return _plain((input * (1 - target) + target * (1 - input)).sum(-1) / over)


def _dice_size(input: Tensor, target: Tensor, smooth: float = 1.0) -> tuple[Tensor, ...]:
    over = (input.sum(-1) + target.sum(-1) + smooth).unsqueeze(-1)
    losses, _ = _dice(input, target, smooth)
    own = losses.unsqueeze(-1)
    return losses, (1 + 2 * target + own) / over, (1 + 2 * input + own) / over


def _focal(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Terms:
    kept, index = _kept(target, ignore_index)
    log_p = _at(*_logs(temperature, input), index)
    w = kept.to(input.dtype) if weight is None else weight[index] * kept
    losses = log_p if gamma == 0 else (-torch.expm1(log_p)) ** gamma * log_p
    return torch.where(kept, -losses * w, 0), w


def _info_nce(similarity: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Terms:
    index = torch.arange(similarity.shape[0]) if target is None else target
    return _focal(similarity, index, 0.0, temperature=temperature)


def _counted(losses: Tensor, target: Tensor | None, ignore_index: int) -> Terms:
    if target is None:
        return _plain(losses)
    kept, _ = _kept(target, ignore_index)
    return torch.where(kept, losses, 0), kept.to(losses.dtype)


def _kl_of(p: Tensor, q: Tensor) -> Tensor:
    """Of logarithms."""
    return (p.exp() * (p - q)).sum(-1)


def _shifted(temperature: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less the largest one, and the sum of the exponentials of the others."""
    top = x.detach().argmax(-1, keepdim=True)
    others = torch.arange(x.shape[-1]) != top
    a = torch.where(others, x - x.gather(-1, top), 0) / temperature
    return a, torch.where(others, a.exp(), 0).sum(-1, keepdim=True)


def _logs(temperature: float, *logits: Tensor) -> list[Tensor]:
    """Of probabilities; that of a sure class is right in its digits, unlike log_softmax's."""
    return [a - rest.log1p() for a, rest in (_shifted(temperature, x) for x in logits)]


def _kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    p, t = _logs(temperature, student, teacher)
    losses = _kl_of(t, p) if direction == "forward" else _kl_of(p, t)
    return _counted(losses, target, ignore_index)


def _kl_size(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
    **target: Any,
) -> tuple[Tensor, ...]:
    """The logarithm of a ratio is a scaled difference of logits, and one more of whole rows."""
    if direction == "reverse":
        losses, y, x = _kl_size(teacher, student, temperature, **target)
        return losses, x, y
    p, t = _logs(temperature, student, teacher)
    d = (student - teacher) / temperature
    ratio = d.abs() + (d - (p - t)).abs() + 1
    own = _kl_of(t, p).unsqueeze(-1)
    p, t = p.exp(), t.exp()
    return (t * ratio + p).sum(-1), (p + t) / temperature, t * (ratio + own) / temperature


def _js(
    student: Tensor,
    teacher: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    p, t = _logs(temperature, student, teacher)
    m = torch.logaddexp(t + math.log(beta), p + math.log1p(-beta))
    return _counted(beta * _kl_of(t, m) + (1 - beta) * _kl_of(p, m), target, ignore_index)


def _js_size(
    student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0, **target: Any
) -> tuple[Tensor, ...]:
    """An error of either probability counts by the logarithm of the ratio to the mixture's."""
    p, t = _logs(temperature, student, teacher)
    m = torch.logaddexp(t + math.log(beta), p + math.log1p(-beta))
    sizes = []
    for q, share in ((p, 1 - beta), (t, beta)):
        own = _kl_of(q, m).unsqueeze(-1)
        sizes.append(share / temperature * (q.exp() * ((q - m).abs() + own) + m.exp()))
    return (sizes[0] + sizes[1]).sum(-1) * temperature, *sizes


def _tv(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    p, t = ((x / temperature).softmax(-1) for x in (student, teacher))
    return _counted(0.5 * (p - t).abs().sum(-1), target, ignore_index)


def _tv_size(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, **target: Any
) -> tuple[Tensor, ...]:
    p, t = ((x / temperature).softmax(-1) for x in (student, teacher))
    return 0.5 * (p + t).sum(-1), p / temperature, t / temperature


def _entropy(
    input: Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Terms:
    a, rest = _shifted(temperature, input)
    losses = (rest.log1p() - (a.exp() * a).sum(-1, keepdim=True) / (1 + rest)).squeeze(-1)
    return _counted(losses, target, ignore_index)


def _entropy_size(input: Tensor, temperature: float = 1.0, **target: Any) -> tuple[Tensor, ...]:
    (p,) = _logs(temperature, input)
    own = -(p.exp() * p).sum(-1)
    return own, p.exp() * (own.unsqueeze(-1) - p) / temperature


# ---- tensors -------------------------------------------------------------------------------------


def items_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the unreduced loss."""
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def _columns(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else shape[0]


def _normal(shape: tuple[int, ...], random: Random, factor: float = 1.0) -> Tensor:
    return factor * torch.randn(shape, generator=random, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], random: Random) -> Tensor:
    return torch.rand(shape, generator=random, dtype=torch.float64)


def _classes(shape: tuple[int, ...], random: Random) -> Tensor:
    return torch.randint(_columns(shape), items_of(shape), generator=random)


def _logits(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _normal(shape, random, 3), "target": _classes(shape, random)}


def _log_probabilities(shape: tuple[int, ...], random: Random) -> Tensors:
    logits = _normal(shape, random, 3).log_softmax(1 if len(shape) > 1 else 0)
    return {"input": logits, "target": _classes(shape, random)}


def _labels(shape: tuple[int, ...], random: Random) -> Tensors:
    """Up to five classes an item, one of them twice, up to a -1; then what does not count."""
    input, columns = _normal(shape, random), _columns(shape)
    order = torch.rand(shape, generator=random).argsort(-1)
    counts = torch.randint(min(columns, 5) + 1, (*items_of(shape), 1), generator=random)
    target = torch.where(torch.arange(columns) == counts, -1, order)
    if columns > 4 and len(shape) > 1:
        target[::3, 1] = target[::3, 0]
    return {"input": input, "target": target}


def _multi_hot(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _normal(shape, random, 3), "target": _uniform(shape, random)}


def _pairs(shape: tuple[int, ...], random: Random) -> Tensors:
    signs = torch.randint(3, items_of(shape), generator=random) * 3 % 5 - 1  # -1, 2, 0
    signs = torch.where(signs == 2, 1, signs)
    pair = {f"input{k}": _normal(shape, random) for k in (1, 2)}
    return {**pair, "target": signs.double()}


def _triples(shape: tuple[int, ...], random: Random) -> Tensors:
    return {n: _normal(shape, random) for n in ("anchor", "positive", "negative")}


def _shares(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _uniform(shape, random), "target": _uniform(shape, random)}


def _distributions(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"student": _normal(shape, random, 2), "teacher": _normal(shape, random, 2)}


def _similarities(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"similarity": _normal(shape, random), "target": _classes(shape, random)}


def _alone(shape: tuple[int, ...], random: Random) -> Tensors:
    return {"input": _normal(shape, random, 2)}


def _first(sample: RowSample) -> tuple[int, ...]:
    return tuple(next(iter(sample.tensors.values())).shape)


def class_weight(sample: RowSample, random: Random) -> Tensor:
    """One weight a class."""
    return _uniform((_columns(_first(sample)),), random) + 0.25


def item_weight(sample: RowSample, random: Random) -> Tensor:
    """One weight an item."""
    return _uniform(items_of(_first(sample)), random) + 0.25


def _some_ignored(sample: RowSample, random: Random) -> Tensor:
    target = _classes(_first(sample), random)
    return torch.where(torch.rand(target.shape, generator=random) < 0.3, -100, target)


def _any_class(sample: RowSample, random: Random) -> Tensor:
    return _classes(_first(sample), random)


def _none_left(sample: RowSample, random: Random) -> Tensor:
    return torch.full(items_of(_first(sample)), -100)


# ---- the list ------------------------------------------------------------------------------------

_WEIGHT = {"weight": class_weight}
_SAMPLE = {"sample_weight": item_weight}
_PLAIN = Variation("plain")
_WEIGHTED = (_PLAIN, Variation("weight", _WEIGHT))
_SAMPLES = (
    Variation("sample weight", _SAMPLE, torch=False),
    Variation("denominator", {"denominator": 7.5}, torch=False),
    Variation("both", _SAMPLE | {"denominator": 3.0}, torch=False),
)
_IGNORED = (
    Variation("ignored", {"target": _some_ignored}),
    Variation("all ignored", {"target": _none_left}),
    Variation("ignored class", {"target": _any_class, "ignore_index": 0}, torch=False),
    Variation("weighted, ignored", {"target": _some_ignored, **_SAMPLE}, torch=False),
)
_CLASSES = (
    *_IGNORED[:2],
    Variation("weight, ignored", {"target": _some_ignored, **_WEIGHT}),
    Variation("ignored class", {"ignore_index": 0}),
    Variation("everything", {"target": _some_ignored, **_WEIGHT, **_SAMPLE}, torch=False),
)
_WARM = Variation("warm", {"temperature": 2.5}, torch=False)
_COLD = Variation("cold", {"temperature": 0.4}, torch=False)


def _of(**named: dict[str, Any]) -> tuple[Variation, ...]:
    return tuple(Variation(name.replace("_", " "), options) for name, options in named.items())


_LOSS = mbkern.nn
_ONE = ("input",)
_BOTH = ("input", "target")
_PAIR = ("student", "teacher")

ROW_CASES = (
    RowCase(
        "nll_loss", _ONE, _nll, F.nll_loss, _LOSS.NLLLoss, _log_probabilities,
        (*_WEIGHTED, *_CLASSES, *_SAMPLES), images=True,
    ),
    RowCase(
        "multi_margin_loss", _ONE, _multi_margin, F.multi_margin_loss, _LOSS.MultiMarginLoss,
        _logits, (
            *_WEIGHTED, *_SAMPLES,
            *_of(squared={"p": 2}, wide={"margin": 3.5}, all={"p": 2, "margin": 0.3, **_WEIGHT}),
        ), size=_multi_margin_size,
    ),
    RowCase(
        "multilabel_margin_loss", _ONE, _multilabel_margin, F.multilabel_margin_loss,
        _LOSS.MultiLabelMarginLoss, _labels, (_PLAIN, *_SAMPLES), size=_multilabel_margin_size,
    ),
    RowCase(
        "multilabel_soft_margin_loss", _BOTH, _multilabel_soft_margin,
        F.multilabel_soft_margin_loss, _LOSS.MultiLabelSoftMarginLoss, _multi_hot,
        (
            *_WEIGHTED, *_SAMPLES,
            Variation("both weights", _WEIGHT | _SAMPLE, torch=False),
        ), size=_multilabel_soft_margin_size,
    ),
    RowCase(
        "cosine_embedding_loss", ("input1", "input2"), _cosine, F.cosine_embedding_loss,
        _LOSS.CosineEmbeddingLoss, _pairs,
        (_PLAIN, *_SAMPLES, *_of(margin={"margin": 0.1}, negative={"margin": -0.5})),
        size=_cosine_size,
    ),
    RowCase(
        "triplet_margin_loss", ("anchor", "positive", "negative"), _triplet, F.triplet_margin_loss,
        _LOSS.TripletMarginLoss, _triples,
        (
            _PLAIN, *_SAMPLES,
            *_of(swap={"swap": True}, margin={"margin": 0.2}, eps={"eps": 0.01, "swap": True}),
        ), size=_triplet_size,
    ),
    RowCase(
        "dice_loss", _BOTH, _dice, None, _LOSS.DiceLoss, _shares,
        (_PLAIN, *_SAMPLES, *_of(smooth={"smooth": 0.1}, none={"smooth": 0.0})), size=_dice_size,
    ),
    RowCase(
        "softmax_focal_loss", _ONE, _focal, None, _LOSS.SoftmaxFocalLoss, _logits,
        (
            *_WEIGHTED, *_CLASSES, *_SAMPLES, _WARM, _COLD,
            *_of(none={"gamma": 0.0}, linear={"gamma": 1.0}, soft={"gamma": 0.5}),
            *_of(steep={"gamma": 3.5, "temperature": 1.5}),
        ), images=True,
    ),
    RowCase(
        "kl_div_with_logits", _PAIR, _kl, None, _LOSS.KLDivWithLogits, _distributions,
        (
            _PLAIN, *_IGNORED, *_SAMPLES, _WARM, _COLD,
            *_of(reverse={"direction": "reverse"}),
            *_of(reverse_warm={"direction": "reverse", "temperature": 2.0, **_SAMPLE}),
        ), images=True, size=_kl_size,
    ),
    RowCase(
        "js_div_with_logits", _PAIR, _js, None, _LOSS.JSDivWithLogits, _distributions,
        (
            _PLAIN, *_IGNORED, *_SAMPLES, _WARM,
            *_of(low={"beta": 0.1}, high={"beta": 0.9, "temperature": 2.0}),
        ), images=True, size=_js_size,
    ),
    RowCase(
        "tv_distance_with_logits", _PAIR, _tv, None, _LOSS.TVDistanceWithLogits, _distributions,
        (_PLAIN, *_IGNORED, *_SAMPLES, _WARM, _COLD), images=True, size=_tv_size,
    ),
    RowCase(
        "entropy_with_logits", _ONE, _entropy, None, _LOSS.EntropyWithLogits, _alone,
        (_PLAIN, *_IGNORED, *_SAMPLES, _WARM, _COLD), images=True, size=_entropy_size,
    ),
    RowCase(
        "info_nce_loss", ("similarity",), _info_nce, None, _LOSS.InfoNCELoss, _similarities,
        (_PLAIN, *_SAMPLES, _WARM, _COLD), registered=False,
    ),
)  # fmt: skip

KERNELS = tuple(case for case in ROW_CASES if case.registered)


def direct(case: RowCase, sample: RowSample) -> tuple[list[Tensor], dict[str, Any]]:
    """The arguments of ``mbkern.loss_and_grad``: tensors by position, options by name."""
    options = dict(sample.options)
    if "direction" in options:
        options["reverse"] = options.pop("direction") == "reverse"
    return list(sample.tensors.values()), options
