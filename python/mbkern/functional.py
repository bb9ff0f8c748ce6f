"""Drop-in losses with the names, arguments and results of ``torch.nn.functional``.

Every function takes, besides torch's arguments,

sample_weight:
    one weight an item, broadcast to the shape of the unreduced loss; ``mean`` then divides by the
    sum of the weights.
denominator:
    a number or 0-dim tensor that replaces the mean's divisor (``reduction="mean"`` only). With the
    item count of the whole mini-batch here, micro-batches add up to its exact mean.
inplace:
    write the gradient over the input: no memory for a gradient, and the input is gone. Refused for
    leaves that require grad.
grad_scale:
    a hint of the gradient that will come in (GradScaler's scale, for instance), so that 16-bit
    gradients can be formed in the forward pass without underflow. Changes no value.
loss_dtype:
    the dtype of the result, if not torch's (the input's, or float32 under autocast).

Inputs are float32, bfloat16, float16 or float64. 16-bit inputs are computed in float32 and rounded
once. Errors: ValueError for shapes and option values, TypeError for dtypes and tensor types,
IndexError for a class index out of range; nothing has been written then.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction as _legacy

from mbkern import _traced
from mbkern._arguments import (
    Number,
    check_reduction,
    combine_weights,
    promoted_dtype,
    result_dtype,
)
from mbkern._launch import RowCall, RowOptions
from mbkern._launch_pointwise import PointwiseCall, PointwiseOptions
from mbkern._losses import Loss, find
from mbkern._tensors import is_differentiated
from mbkern.autograd import Request, apply_pointwise, apply_row

__all__ = ["cross_entropy", "half_squared_error", "mse_loss"]

_CROSS_ENTROPY = find("cross_entropy")
_MSE_LOSS = find("mse_loss")
_HALF_SQUARED_ERROR = find("half_squared_error")


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

    The other arguments are those of the module. Differentiable in ``input`` and in class
    probabilities.

    Source of the method: the term of the target class is kept apart from the sum of the others, so
    that neither the loss log1p(R) nor the gradient -R / S cancels for confident logits
    (docs/numerics.md).
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy.legacy_get_string(size_average, reduce)
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


def row_loss(
    loss: Loss,
    input: Tensor,
    target: Tensor,
    options: RowOptions,
    grad_scale: Number | None,
    inplace: bool,
    loss_dtype: torch.dtype | None,
) -> Tensor:
    """Compute any loss over rows of classes; the common end of the public functions."""
    check_reduction(options.reduction, options.denominator)
    if target.dtype is not input.dtype and target.is_floating_point():
        # Class probabilities of another dtype: as in torch, in the promotion of both, by a copy.
        if inplace:
            raise TypeError(
                f"mbkern: inplace=True needs class probabilities of the input's dtype, "
                f"{input.dtype}, not {target.dtype}"
            )
        both = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(both), target.to(both)
    loss_dtype = result_dtype(loss_dtype, input.dtype, input)
    o = options
    if o.weight is not None or o.sample_weight is not None or o.denominator is not None:
        _refuse_other_gradients(o.weight, o.sample_weight, o.denominator)
    if _traced.is_needed(input, target):
        return _traced.row_loss(loss, input, target, options, grad_scale, loss_dtype)
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        request = Request(loss, options, grad_scale, inplace, loss_dtype)
        result: Tensor = apply_row(input, target, request)  # type: ignore[no-untyped-call]
        return result
    value, _ = RowCall(loss.number, input, target, options).run(loss_dtype=loss_dtype)
    assert value is not None
    return value


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    inplace: bool = False,
    grad_scale: Number | None = None,
    denominator: Number | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """Squared error (input - target)^2: :func:`torch.nn.functional.mse_loss`.

    Args:
        input, target: tensors that broadcast to one shape; both differentiable.
        weight: of the input's shape; ``mean`` divides by the sum of the weights.
        reduction: "none", "mean" or "sum".

    The other arguments are those of the module; an item is an element.
    """
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"mbkern: weight {tuple(weight.shape)} and input {tuple(input.shape)} must have "
            "the same shape"
        )
    return pointwise_loss(
        _MSE_LOSS, input, target, size_average, reduce, reduction, weight, sample_weight, inplace,
        grad_scale, denominator, loss_dtype,
    )  # fmt: skip


def half_squared_error(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    sample_weight: Tensor | None = None,
    inplace: bool = False,
    grad_scale: Number | None = None,
    denominator: Number | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """Half the squared error, (input - target)^2 / 2, whose gradient is the residual.

    Args:
        input, target: tensors that broadcast to one shape; both differentiable.
        reduction: "none", "mean" or "sum".

    The other arguments are those of the module; an item is an element.
    """
    return pointwise_loss(
        _HALF_SQUARED_ERROR, input, target, None, None, reduction, None, sample_weight, inplace,
        grad_scale, denominator, loss_dtype,
    )  # fmt: skip


def pointwise_loss(
    loss: Loss,
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    inplace: bool,
    grad_scale: Number | None,
    denominator: Number | None,
    loss_dtype: torch.dtype | None,
    parameter: float = 0.0,
) -> Tensor:
    """Compute any element-wise loss; the common end of the public functions."""
    if size_average is not None or reduce is not None:
        reduction = _legacy.legacy_get_string(size_average, reduce)
    check_reduction(reduction, denominator)
    if weight is not None or sample_weight is not None or denominator is not None:
        _refuse_other_gradients(weight, sample_weight, denominator)
    if input.shape != target.shape:
        if inplace:
            raise ValueError(
                f"mbkern: inplace=True needs input and target of one shape, not "
                f"{tuple(input.shape)} and {tuple(target.shape)}"
            )
        input, target = torch.broadcast_tensors(input, target)  # type: ignore[no-untyped-call]
    loss_dtype = result_dtype(loss_dtype, promoted_dtype(input, target), input)
    weights = combine_weights(weight, sample_weight, input.shape)
    options = PointwiseOptions(weights, reduction, denominator, parameter)
    if _traced.is_needed(input, target):
        return _traced.pointwise_loss(loss, input, target, options, grad_scale, loss_dtype)
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        request = Request(loss, options, grad_scale, inplace, loss_dtype)
        result: Tensor = apply_pointwise(input, target, request)  # type: ignore[no-untyped-call]
        return result
    value, _ = PointwiseCall(loss.number, input, target, options).run(loss_dtype=loss_dtype)
    assert value is not None
    return value


def _refuse_other_gradients(
    weight: Tensor | None, sample_weight: Tensor | None, denominator: Number | None
) -> None:
    for value in (weight, sample_weight, denominator):
        if isinstance(value, Tensor) and torch.is_grad_enabled() and is_differentiated(value):
            raise NotImplementedError(
                "mbkern: no gradient is computed for weights and denominators; detach them, or use "
                "torch.nn.functional"
            )
