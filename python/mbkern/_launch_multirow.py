"""From tensors to kernels: losses of rows of several tensors. See ``_launch_tensors``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbkern import _C
from mbkern._arguments import class_weight, refuse_indices
from mbkern._launch_tensors import Grads, Inputs, TensorCall, TensorOptions
from mbkern._losses import Loss
from mbkern._tensors import INDEX_TYPES, require_dtype, require_plain


class MultirowCall(TensorCall):
    """One call of a loss of rows of its tensors: (C), (N, C) or (N, C, d1, ...)."""

    __slots__ = ()

    def __init__(self, loss: Loss, inputs: Inputs, options: TensorOptions) -> None:
        if loss.is_flat and inputs[0].dim() > 2:
            raise ValueError(
                f"mbkern: {loss.name} takes (C) or (N, C), not {tuple(inputs[0].shape)}"
            )
        super().__init__(loss, inputs, options)

    @property
    def shape(self) -> torch.Size:
        """The shape of the unreduced loss."""
        shape = self.inputs[0].shape
        return shape[:1] + shape[2:] if len(shape) > 1 else torch.Size(())

    def explain(self) -> None:
        """Raise if these arguments are no loss; otherwise make the tensors plain."""
        super().explain()
        shape = self.inputs[0].shape
        if len(shape) == 0:
            raise ValueError(
                f"mbkern: {self.loss.arguments[0]} must have a dimension of rows: (C), (N, C) or "
                "(N, C, d1, ...), not ()"
            )
        if self.target is None:
            return
        self.target = target = require_plain(self.target, "target")
        if self.loss.target == "label":
            require_dtype(target, "target")
            if target.shape != self.shape:
                raise ValueError(
                    f"mbkern: target has shape {tuple(target.shape)}; it must have one number an "
                    f"item, {tuple(self.shape)}"
                )
            return
        wanted = shape if self.loss.target == "list" else self.shape
        if target.dtype not in INDEX_TYPES or target.shape != wanted:
            refuse_indices(target, shape, wanted)

    def _weight(self, weight: Tensor) -> Tensor:
        shape = self.inputs[0].shape
        return class_weight(weight, shape[1 if len(shape) > 1 else 0], self.compute)

    def _kernel(self) -> Callable[..., float | None]:
        return _C.multirow_loss

    def _new_losses(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=self.compute, device=self.inputs[0].device)

    def _fields(
        self, item_scale: Tensor | None, losses: Tensor | None, grads: Grads, accumulate: bool
    ) -> tuple[Any, ...]:
        return (
            self.target, self.weight, self.sample_weight, item_scale, losses, *grads, accumulate,
            self.options.ignore_index,
        )  # fmt: skip
