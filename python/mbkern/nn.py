"""Drop-in modules with the constructors and state_dict keys of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbkern import functional as F
from mbkern._arguments import Number

__all__ = ["CrossEntropyLoss", "HalfSquaredError", "MSELoss"]


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


class _PointwiseModule(torch.nn.Module):
    """What element-wise loss modules have in common."""

    def __init__(self, reduction: str, extras: dict[str, Any]) -> None:
        super().__init__()
        self.reduction = reduction
        self.inplace: bool = extras["inplace"]
        self.grad_scale: Number | None = extras["grad_scale"]
        self.denominator: Number | None = extras["denominator"]
        self.loss_dtype: torch.dtype | None = extras["loss_dtype"]

    def _extras(self, sample_weight: Tensor | None) -> dict[str, Any]:
        return {
            "sample_weight": sample_weight,
            "inplace": self.inplace,
            "grad_scale": self.grad_scale,
            "denominator": self.denominator,
            "loss_dtype": self.loss_dtype,
        }


class MSELoss(_PointwiseModule):
    """:class:`torch.nn.MSELoss` computed by :func:`mbkern.functional.mse_loss`."""

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        inplace: bool = False,
        grad_scale: Number | None = None,
        denominator: Number | None = None,
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        reduction = torch.nn.MSELoss(size_average, reduce, reduction).reduction
        super().__init__(
            reduction,
            {
                "inplace": inplace,
                "grad_scale": grad_scale,
                "denominator": denominator,
                "loss_dtype": loss_dtype,
            },
        )

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.mse_loss(input, target, reduction=self.reduction, **self._extras(sample_weight))


class HalfSquaredError(_PointwiseModule):
    """:func:`mbkern.functional.half_squared_error` as a module."""

    def __init__(
        self,
        reduction: str = "mean",
        *,
        inplace: bool = False,
        grad_scale: Number | None = None,
        denominator: Number | None = None,
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            reduction,
            {
                "inplace": inplace,
                "grad_scale": grad_scale,
                "denominator": denominator,
                "loss_dtype": loss_dtype,
            },
        )

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.half_squared_error(input, target, self.reduction, **self._extras(sample_weight))
