"""Modules of losses that torch has, of which an item is an element."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern import functional as F
from mbkern.nn._module import Extras, TorchLoss


class MSELoss(TorchLoss, torch.nn.MSELoss):
    """The counterpart of :class:`torch.nn.MSELoss`.

    ``MSELoss(size_average=None, reduce=None, reduction="mean")``
    """

    _function = staticmethod(F.mse_loss)


class L1Loss(TorchLoss, torch.nn.L1Loss):
    """The counterpart of :class:`torch.nn.L1Loss`.

    ``L1Loss(size_average=None, reduce=None, reduction="mean")``
    """

    _function = staticmethod(F.l1_loss)


class SmoothL1Loss(TorchLoss, torch.nn.SmoothL1Loss):
    """The counterpart of :class:`torch.nn.SmoothL1Loss`.

    ``SmoothL1Loss(size_average=None, reduce=None, reduction="mean", beta=1.0)``
    """

    _function = staticmethod(F.smooth_l1_loss)
    _options = ("beta",)


class HuberLoss(TorchLoss, torch.nn.HuberLoss):
    """The counterpart of :class:`torch.nn.HuberLoss`.

    ``HuberLoss(reduction="mean", delta=1.0)``
    """

    _function = staticmethod(F.huber_loss)
    _options = ("delta",)


class BCELoss(TorchLoss, torch.nn.BCELoss):
    """The counterpart of :class:`torch.nn.BCELoss`.

    ``BCELoss(weight=None, size_average=None, reduce=None, reduction="mean")``
    """

    _function = staticmethod(F.binary_cross_entropy)
    _options = ("weight",)


class BCEWithLogitsLoss(TorchLoss, torch.nn.BCEWithLogitsLoss):
    """The counterpart of :class:`torch.nn.BCEWithLogitsLoss`.

    ``BCEWithLogitsLoss(weight=None, size_average=None, reduce=None, reduction="mean",
    pos_weight=None)``
    """

    _function = staticmethod(F.binary_cross_entropy_with_logits)
    _options = ("weight", "pos_weight")


class SoftMarginLoss(TorchLoss, torch.nn.SoftMarginLoss):
    """The counterpart of :class:`torch.nn.SoftMarginLoss`.

    ``SoftMarginLoss(size_average=None, reduce=None, reduction="mean")``
    """

    _function = staticmethod(F.soft_margin_loss)


class HingeEmbeddingLoss(TorchLoss, torch.nn.HingeEmbeddingLoss):
    """The counterpart of :class:`torch.nn.HingeEmbeddingLoss`.

    ``HingeEmbeddingLoss(margin=1.0, size_average=None, reduce=None, reduction="mean")``
    """

    _function = staticmethod(F.hinge_embedding_loss)
    _options = ("margin",)


class KLDivLoss(TorchLoss, torch.nn.KLDivLoss):
    """The counterpart of :class:`torch.nn.KLDivLoss`.

    ``KLDivLoss(size_average=None, reduce=None, reduction="mean", log_target=False)``
    """

    _function = staticmethod(F.kl_div)
    _options = ("log_target",)


class PoissonNLLLoss(Extras, torch.nn.PoissonNLLLoss):
    """The counterpart of :class:`torch.nn.PoissonNLLLoss`.

    ``PoissonNLLLoss(log_input=True, full=False, size_average=None, eps=1e-08, reduce=None,
    reduction="mean")``
    """

    def forward(
        self, log_input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of (logarithms of) rates against counts; torch calls them so."""
        return F.poisson_nll_loss(
            log_input,
            target,
            reduction=self.reduction,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            **self._extras(sample_weight),
        )


class GaussianNLLLoss(Extras, torch.nn.GaussianNLLLoss):
    """The counterpart of :class:`torch.nn.GaussianNLLLoss`.

    ``GaussianNLLLoss(full=False, eps=1e-06, reduction="mean")``
    """

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        var: Tensor | float,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of means ``input`` and variances ``var`` against ``target``."""
        return F.gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction,
            **self._extras(sample_weight),
        )  # fmt: skip


class MarginRankingLoss(Extras, torch.nn.MarginRankingLoss):
    """The counterpart of :class:`torch.nn.MarginRankingLoss`.

    ``MarginRankingLoss(margin=0.0, size_average=None, reduce=None, reduction="mean")``
    """

    def forward(
        self,
        input1: Tensor,
        input2: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of two scores, the first of which is to be larger where target is 1."""
        return F.margin_ranking_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction,
            **self._extras(sample_weight),
        )  # fmt: skip
