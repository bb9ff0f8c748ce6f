"""Softmax cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern._arguments import Number, legacy_reduction
from mbkern._launch import RowOptions
from mbkern._losses import find
from mbkern.functional._ends import row_loss

_CROSS_ENTROPY = find("cross_entropy")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    inplace: bool = False,
    grad_scale: Number | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    denominator: Number | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of logits, with loss and gradient in one pass.

    The counterpart of :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...), contiguous, channels_last or strided.
        target: class indices, () or (N) or (N, d1, ...), of any integer dtype; or class
            probabilities of the shape of ``input``.
        weight: one weight a class, (C).
        ignore_index: items with this class index count nothing, and their gradient is 0.
        reduction: "none", "mean" or "sum". The mean divides by the sum over the items that are not
            ignored of class weight times sample weight (class probabilities: the number of items).
        label_smoothing: in [0, 1]; the share of the target that is spread over all classes.
        z_loss: coefficient of the squared log-sum-exp that is added to each item's loss.
        softcap: cap of ``softcap * tanh(input / softcap)``, applied to the logits first.
        size_average, reduce: deprecated, as in torch.

    ``sample_weight``, ``denominator``, ``inplace``, ``grad_scale`` and ``loss_dtype``: as of every
    loss, see ``help(mbkern.functional)``. Differentiable in ``input`` and in class probabilities.

    Source of the method: the term of the target class is kept apart from the sum of the others, so
    that neither the loss log1p(R) nor the gradient -R / S cancels for confident logits
    (docs/numerics.md).
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce, stacklevel=3)
    options = RowOptions(
        weight,
        sample_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        denominator,
    )
    return row_loss(_CROSS_ENTROPY, input, target, options, grad_scale, inplace, loss_dtype)
