"""Modules of torch's losses of which an item is a row."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern import functional as F
from mbkern.nn._module import Extras


class NLLLoss(Extras, torch.nn.NLLLoss):
    """The counterpart of :class:`torch.nn.NLLLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            **self._extras(sample_weight),
        )


class MultiMarginLoss(Extras, torch.nn.MultiMarginLoss):
    """The counterpart of :class:`torch.nn.MultiMarginLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.multi_margin_loss(
            input,
            target,
            p=self.p,
            margin=self.margin,
            weight=self.weight,
            reduction=self.reduction,
            **self._extras(sample_weight),
        )


class MultiLabelMarginLoss(Extras, torch.nn.MultiLabelMarginLoss):
    """The counterpart of :class:`torch.nn.MultiLabelMarginLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.multilabel_margin_loss(
            input, target, reduction=self.reduction, **self._extras(sample_weight)
        )


class MultiLabelSoftMarginLoss(Extras, torch.nn.MultiLabelSoftMarginLoss):
    """The counterpart of :class:`torch.nn.MultiLabelSoftMarginLoss`."""

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.multilabel_soft_margin_loss(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            **self._extras(sample_weight),
        )


class CosineEmbeddingLoss(Extras, torch.nn.CosineEmbeddingLoss):
    """The counterpart of :class:`torch.nn.CosineEmbeddingLoss`."""

    def forward(
        self,
        input1: Tensor,
        input2: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of pairs that are alike where target is 1."""
        return F.cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction,
            **self._extras(sample_weight),
        )  # fmt: skip


class TripletMarginLoss(Extras, torch.nn.TripletMarginLoss):
    """The counterpart of :class:`torch.nn.TripletMarginLoss`, for the 2-norm."""

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of anchors, what is to be near them and what is to be far."""
        return F.triplet_margin_loss(
            anchor, positive, negative, margin=self.margin, p=self.p, eps=self.eps, swap=self.swap,
            reduction=self.reduction, **self._extras(sample_weight),
        )  # fmt: skip


#: Torch's own: the distance is the caller's function.
TripletMarginWithDistanceLoss = torch.nn.TripletMarginWithDistanceLoss
