"""Modules of losses that torch has."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern import functional as F
from mbkern.nn._module import Extras


class MSELoss(Extras, torch.nn.MSELoss):
    """The counterpart of :class:`torch.nn.MSELoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.mse_loss(input, target, reduction=self.reduction, **self._extras(sample_weight))


class L1Loss(Extras, torch.nn.L1Loss):
    """The counterpart of :class:`torch.nn.L1Loss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.l1_loss(input, target, reduction=self.reduction, **self._extras(sample_weight))


class SmoothL1Loss(Extras, torch.nn.SmoothL1Loss):
    """The counterpart of :class:`torch.nn.SmoothL1Loss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.smooth_l1_loss(
            input, target, reduction=self.reduction, beta=self.beta, **self._extras(sample_weight)
        )


class HuberLoss(Extras, torch.nn.HuberLoss):
    """The counterpart of :class:`torch.nn.HuberLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.huber_loss(
            input, target, reduction=self.reduction, delta=self.delta, **self._extras(sample_weight)
        )


class BCELoss(Extras, torch.nn.BCELoss):
    """The counterpart of :class:`torch.nn.BCELoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.binary_cross_entropy(
            input,
            target,
            reduction=self.reduction,
            weight=self.weight,
            **self._extras(sample_weight),
        )


class BCEWithLogitsLoss(Extras, torch.nn.BCEWithLogitsLoss):
    """The counterpart of :class:`torch.nn.BCEWithLogitsLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            reduction=self.reduction,
            weight=self.weight,
            pos_weight=self.pos_weight,
            **self._extras(sample_weight),
        )


class SoftMarginLoss(Extras, torch.nn.SoftMarginLoss):
    """The counterpart of :class:`torch.nn.SoftMarginLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.soft_margin_loss(
            input, target, reduction=self.reduction, **self._extras(sample_weight)
        )


class HingeEmbeddingLoss(Extras, torch.nn.HingeEmbeddingLoss):
    """The counterpart of :class:`torch.nn.HingeEmbeddingLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.hinge_embedding_loss(
            input,
            target,
            reduction=self.reduction,
            margin=self.margin,
            **self._extras(sample_weight),
        )


class PoissonNLLLoss(Extras, torch.nn.PoissonNLLLoss):
    """The counterpart of :class:`torch.nn.PoissonNLLLoss`."""

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


class KLDivLoss(Extras, torch.nn.KLDivLoss):
    """The counterpart of :class:`torch.nn.KLDivLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.kl_div(
            input,
            target,
            reduction=self.reduction,
            log_target=self.log_target,
            **self._extras(sample_weight),
        )


class GaussianNLLLoss(Extras, torch.nn.GaussianNLLLoss):
    """The counterpart of :class:`torch.nn.GaussianNLLLoss`."""

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
    """The counterpart of :class:`torch.nn.MarginRankingLoss`."""

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
