"""Modules of losses that torch has, of which an item is a row."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern import functional as F
from mbkern.nn._module import Extras, TorchLoss


class NLLLoss(TorchLoss, torch.nn.NLLLoss):
    """The counterpart of :class:`torch.nn.NLLLoss`.

    ``NLLLoss(weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean")``
    """

    _function = staticmethod(F.nll_loss)
    _options = ("weight", "ignore_index")


class MultiMarginLoss(TorchLoss, torch.nn.MultiMarginLoss):
    """The counterpart of :class:`torch.nn.MultiMarginLoss`.

    ``MultiMarginLoss(p=1, margin=1.0, weight=None, size_average=None, reduce=None,
    reduction="mean")``
    """

    _function = staticmethod(F.multi_margin_loss)
    _options = ("p", "margin", "weight")


class MultiLabelMarginLoss(TorchLoss, torch.nn.MultiLabelMarginLoss):
    """The counterpart of :class:`torch.nn.MultiLabelMarginLoss`.

    ``MultiLabelMarginLoss(size_average=None, reduce=None, reduction="mean")``
    """

    _function = staticmethod(F.multilabel_margin_loss)


class MultiLabelSoftMarginLoss(TorchLoss, torch.nn.MultiLabelSoftMarginLoss):
    """The counterpart of :class:`torch.nn.MultiLabelSoftMarginLoss`.

    ``MultiLabelSoftMarginLoss(weight=None, size_average=None, reduce=None, reduction="mean")``
    """

    _function = staticmethod(F.multilabel_soft_margin_loss)
    _options = ("weight",)


class CosineEmbeddingLoss(Extras, torch.nn.CosineEmbeddingLoss):
    """The counterpart of :class:`torch.nn.CosineEmbeddingLoss`.

    ``CosineEmbeddingLoss(margin=0.0, size_average=None, reduce=None, reduction="mean")``
    """

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
    """The counterpart of :class:`torch.nn.TripletMarginLoss`, for the 2-norm.

    ``TripletMarginLoss(margin=1.0, p=2.0, eps=1e-06, swap=False, size_average=None,
    reduce=None, reduction="mean")``
    """

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
