"""Softmax cross-entropy as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern import functional as F
from mbkern._arguments import Number


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` computed by :func:`mbkern.functional.cross_entropy`.

    Takes torch's arguments, and by keyword those of the function; ``sample_weight``, which differs
    from batch to batch, goes to the call instead.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace: bool = False,
        grad_scale: Number | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        denominator: Number | None = None,
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace = inplace
        self.grad_scale = grad_scale
        self.z_loss = z_loss
        self.softcap = softcap
        self.denominator = denominator
        self.loss_dtype = loss_dtype

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of logits ``input`` and ``target``."""
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            inplace=self.inplace,
            grad_scale=self.grad_scale,
            z_loss=self.z_loss,
            softcap=self.softcap,
            denominator=self.denominator,
            loss_dtype=self.loss_dtype,
        )
