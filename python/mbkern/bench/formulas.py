"""Every loss as users have it without mbkern: torch's function, or the usual chain of operations.

It is the baseline, and in fp64 the reference that all providers are checked against. The names are
those of the case list of the tests; ``tests/test_bench_cases.py`` holds the formulas to that list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mbkern.functional as M
from mbkern._losses import Loss, find

Function = Callable[..., Tensor]


def _log_p(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def _focal(x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    q = p * (1 - y) + (1 - p) * y
    return ((0.25 * y + 0.75 * (1 - y)) * q**2 * ce).mean()


def _log_cosh(x: Tensor, y: Tensor) -> Tensor:
    r = x - y
    return (r + F.softplus(-2 * r) - 0.6931471805599453).mean()


def _quantile(x: Tensor, y: Tensor) -> Tensor:
    r = y - x
    return (0.9 * torch.relu(r) + 0.1 * torch.relu(-r)).mean()  # 0 is the derivative at 0


def _tweedie(x: Tensor, y: Tensor) -> Tensor:
    return (torch.exp(0.5 * x) / 0.5 + y * torch.exp(-0.5 * x) / 0.5).mean()  # power 1.5


def _dice(x: Tensor, y: Tensor) -> Tensor:
    return (1 - (2 * (x * y).sum(-1) + 1) / (x.sum(-1) + y.sum(-1) + 1)).mean()


def _softmax_focal(x: Tensor, t: Tensor) -> Tensor:
    log_p = _log_p(x).gather(-1, t[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def _kl(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(_log_p(x), _log_p(y), reduction="batchmean", log_target=True)


def _js(x: Tensor, y: Tensor) -> Tensor:
    p, q = x.softmax(-1), y.softmax(-1)
    m = (0.5 * (p + q)).log()
    return 0.5 * (F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean"))


def _tv(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x.softmax(-1) - y.softmax(-1)).abs().sum(-1).mean()


def _entropy(x: Tensor) -> Tensor:
    log_p = _log_p(x)
    return -(log_p.exp() * log_p).sum(-1).mean()


@dataclass(frozen=True)
class Formula:
    """One loss without mbkern.

    Attributes:
        name: ours, in ``mbkern.functional``.
        torch: the function of the tensors, reduced by the mean over items.
        others: kinds of the tensors after the first; see :func:`tensors`.
        exponential: whether either side needs an exponential or a logarithm.
        options: what ours takes to compute the same.
        first: the kind of the first tensor.
    """

    name: str
    torch: Function
    others: tuple[str, ...]
    exponential: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    first: str = "real"

    @property
    def loss(self) -> Loss:
        """What mbkern knows about it."""
        return find(self.name)

    def ours(self, *tensors: Tensor) -> Tensor:
        """By mbkern."""
        result: Tensor = getattr(M, self.name)(*tensors, reduction="mean", **dict(self.options))
        return result


ELEMENTS = (
    Formula("mse_loss", F.mse_loss, ("real",)),
    Formula("huber_loss", F.huber_loss, ("real",)),
    Formula("l1_loss", F.l1_loss, ("real",)),
    Formula("smooth_l1_loss", F.smooth_l1_loss, ("real",)),
    Formula("hinge_embedding_loss", F.hinge_embedding_loss, ("sign",)),
    Formula("quantile_loss", _quantile, ("real",), False, (("quantile", 0.9),)),
    Formula("half_squared_error", lambda x, y: F.mse_loss(x, y) / 2, ("real",)),
    Formula("hinge_loss", lambda x, y: (1 - x * y).clamp_min(0).mean(), ("sign",)),
    Formula("squared_hinge_loss", lambda x, y: (1 - x * y).clamp_min(0).square().mean(), ("sign",)),
    Formula("margin_ranking_loss", F.margin_ranking_loss, ("real", "sign")),
    Formula(
        "binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, ("share",), True
    ),
    Formula("binary_cross_entropy", F.binary_cross_entropy, ("share",), True, first="inner"),
    Formula("soft_margin_loss", F.soft_margin_loss, ("sign",), True),
    Formula("poisson_nll_loss", F.poisson_nll_loss, ("share",), True),
    Formula("gaussian_nll_loss", F.gaussian_nll_loss, ("real", "positive"), True),
    Formula("tweedie_nll_loss", _tweedie, ("share",), True),
    Formula("kl_div", F.kl_div, ("share",), True),
    Formula("log_cosh_loss", _log_cosh, ("real",), True),
    Formula("sigmoid_focal_loss", _focal, ("share",), True),
)
ROWS = (
    Formula("nll_loss", F.nll_loss, ("class",)),
    Formula("multi_margin_loss", F.multi_margin_loss, ("class",)),
    Formula("multilabel_margin_loss", F.multilabel_margin_loss, ("list",)),
    Formula("multilabel_soft_margin_loss", F.multilabel_soft_margin_loss, ("share",), True),
    Formula("cosine_embedding_loss", F.cosine_embedding_loss, ("real", "label")),
    Formula("triplet_margin_loss", F.triplet_margin_loss, ("real", "real")),
    Formula("dice_loss", _dice, ("share",), first="share"),
    Formula("softmax_focal_loss", _softmax_focal, ("class",), True),
    Formula("kl_div_with_logits", _kl, ("real",), True),
    Formula("js_div_with_logits", _js, ("real",), True),
    Formula("tv_distance_with_logits", _tv, ("real",), True),
    Formula("entropy_with_logits", _entropy, (), True),
)
CROSS_ENTROPY = Formula("cross_entropy", F.cross_entropy, ("class",), True)
#: Of these, torch's own error in bf16 is beyond any tolerance.
ROUGH_IN_BF16 = ("gaussian_nll_loss", "kl_div", "tweedie_nll_loss", "binary_cross_entropy")
FORMULAS = {f.name: f for f in (CROSS_ENTROPY, *ELEMENTS, *ROWS)}


def tensors(
    formula: Formula, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 3
) -> list[Tensor]:
    """Seeded arguments of a loss, of these kinds.

    real: in [-3, 3); share: in [0, 1); inner: in [0.05, 0.95); sign: -1 or 1; positive: in
    [0.1, 1.1); class: an index an item, int64; label: a sign an item; list: three classes a row,
    then -1.
    """
    random = torch.Generator().manual_seed(seed)
    items = (shape[0], *shape[2:])

    def make(kind: str) -> Tensor:
        if kind == "class":
            return torch.randint(shape[1], items, generator=random)
        if kind == "list":
            listed = torch.full(shape, -1)
            few = min(3, shape[1])
            listed[:, :few] = torch.randint(shape[1], (shape[0], few), generator=random)
            return listed
        x = torch.rand(items if kind == "label" else shape, generator=random)
        if kind in ("sign", "label"):
            x = torch.where(x < 0.5, -1.0, 1.0)
        elif kind == "real":
            x = x.sub_(0.5).mul_(6)
        elif kind == "inner":
            x = x.mul_(0.9).add_(0.05)
        elif kind == "positive":
            x = x.add_(0.1)
        return x.to(dtype)

    return [make(kind).to(device) for kind in (formula.first, *formula.others)]
