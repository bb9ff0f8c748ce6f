"""From checked tensors to kernels: element-wise losses.

This file and ``_launch`` are the only ones that take addresses for the kernels. Every check is made
before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbkern import _C
from mbkern._arguments import REDUCTIONS, Number, compute_dtype, weights_as
from mbkern._launch import ONE, ScalarArgument, new_gradient, scalar_argument
from mbkern._tensors import DTYPES, require_dtype, require_plain


@dataclass(slots=True)
class PointwiseOptions:
    """What an element-wise loss is asked for, besides its input and target."""

    weight: Tensor | None = None
    reduction: str = "mean"
    denominator: Number | None = None
    parameter: float = 0.0


class PointwiseCall:
    """The checked form of one call of an element-wise loss: tensors of one (broadcast) shape."""

    __slots__ = ("compute", "input", "number", "options", "shape", "target", "weight")

    def __init__(
        self, number: int, input: Tensor, target: Tensor, options: PointwiseOptions
    ) -> None:
        self.number = number
        self.options = options
        self.input = require_plain(input, "input")
        self.target = require_plain(target, "target")
        require_dtype(input, "input")
        require_dtype(target, "target")
        if input.shape != target.shape:
            raise ValueError(
                f"mbkern: input {tuple(input.shape)} and target {tuple(target.shape)} must be "
                "broadcast to one shape"
            )
        self.shape = input.shape
        both = torch.promote_types(input.dtype, target.dtype)
        self.compute = compute_dtype(both)
        self.weight = None
        if options.weight is not None:
            weight = weights_as(options.weight, "weight", self.compute)
            try:
                self.weight = weight.expand(self.shape)
            except RuntimeError:
                raise ValueError(
                    f"mbkern: weight has shape {tuple(weight.shape)}, which does not "
                    f"broadcast to the shape of the unreduced loss, {tuple(self.shape)}"
                ) from None

    def run(
        self,
        *,
        want_loss: bool = True,
        grads: tuple[Tensor | None, Tensor | None] = (None, None),
        accumulate: bool = False,
        scale: ScalarArgument = ONE,
        item_scale: Tensor | None = None,
        divisor: float | None = None,
        loss_dtype: torch.dtype,
        loss_sum: Tensor | None = None,
    ) -> tuple[Tensor | None, float]:
        """Run the kernel; return the loss and the divisor of a mean (``divisor``, if given)."""
        o = self.options
        reduction = REDUCTIONS[o.reduction]
        losses = loss = None
        if want_loss:
            if reduction == 0:
                losses = new_gradient(self.input, loss_dtype)
            else:
                loss = torch.empty((), dtype=loss_dtype)
        denominator, keep = scalar_argument(
            o.denominator if divisor is None else divisor, "denominator"
        )
        has_denominator = divisor is not None or o.denominator is not None
        if item_scale is not None:
            item_scale = item_scale.to(self.compute).expand(self.shape)
        views = (self.input, self.target, self.weight, item_scale, losses, grads[0], grads[1])
        shape, strides = _merge_dense(self.shape, views)
        addresses: list[int] = []
        for v in views:
            addresses += (0, 0) if v is None else (v.data_ptr(), DTYPES[v.dtype])
        divisor = _C.pointwise_loss(
            (
                self.number, DTYPES[self.compute], *addresses, accumulate, scale[1], scale[2],
                reduction if divisor is None else REDUCTIONS["mean"], has_denominator,
                denominator[1], denominator[2],
                0 if loss is None else loss.data_ptr(), DTYPES[loss_dtype],
                0 if loss_sum is None else loss_sum.data_ptr(), torch.get_num_threads(),
            ),
            (o.parameter, scale[0], denominator[0]),
            shape,
            strides,
        )  # fmt: skip
        del keep
        return (losses if losses is not None else loss), divisor


def _merge_dense(
    shape: torch.Size, views: tuple[Tensor | None, ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Shape and strides of the views; one dimension if all are laid out alike without gaps."""
    strides = [v.stride() if v is not None else () for v in views]
    first = views[0]
    assert first is not None
    if all(not s or s == strides[0] for s in strides) and (
        first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)
        if first.dim() == 4
        else first.is_contiguous()
    ):
        return (first.numel(),), [
            (1,) if s or v is not None else () for s, v in zip(strides, views, strict=True)
        ]
    return tuple(shape), strides
