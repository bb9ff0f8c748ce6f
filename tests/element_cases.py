"""The case list: element-wise losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Random, Sample, Variation, ramp
from torch import Tensor

import mbkern


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


def _hinge_embedding(input: Tensor, target: Tensor, margin: float = 1.0) -> Tensor:
    near, far = (
        torch.where(target == -1, 0, input),
        torch.where(target == 1, 0, ramp(margin - input)),
    )
    return near + far


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
    var = var.clamp(min=eps)
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

ELEMENT_CASES = (
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
        "hinge_embedding_loss", elements(_hinge_embedding), F.hinge_embedding_loss,
        mbkern.nn.HingeEmbeddingLoss, torch.nn.HingeEmbeddingLoss, _signed,
        _POINTWISE + _with(True, narrow={"margin": 0.5}), size=_embedding_size,
    ),
    Case(
        "hinge_loss", elements(lambda x, y, margin=1.0: ramp(margin - y * x)), None,
        mbkern.nn.HingeLoss, None, _signed, _POINTWISE + _with(False, wide={"margin": 2.0}), _BOTH,
        size=_hinge_size,
    ),
    Case(
        "squared_hinge_loss",
        elements(lambda x, y, margin=1.0: ramp(margin - y * x) ** 2), None,
        mbkern.nn.SquaredHingeLoss, None, _signed, _POINTWISE + _with(False, wide={"margin": 2.0}),
        _BOTH, size=_squared_hinge_size,
    ),
    Case(
        "margin_ranking_loss", elements(
            lambda x, y, target, margin=0.0: ramp(margin - target * (x - y))
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
        _with(
            True, plain={"var": _element_weight}, full={"var": _element_weight, "full": True},
            least={"var": _element_weight, "eps": 0.75},
        )
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
