"""From tensors to kernels: element-wise losses. See ``_launch_tensors``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbkern import _C
from mbkern._arguments import check_values
from mbkern._launch import new_gradient
from mbkern._launch_tensors import Grads, TensorCall


class PointwiseCall(TensorCall):
    """One call of an element-wise loss: tensors of one (broadcast) shape."""

    __slots__ = ()

    @property
    def shape(self) -> torch.Size:
        """The shape of the unreduced loss."""
        return self.inputs[0].shape

    def _weight(self, weight: Tensor) -> Tensor:
        return self._per_item(weight, "weight")

    def _kernel(self) -> Callable[..., float | None]:
        return _C.pointwise_loss

    def _new_losses(self, dtype: torch.dtype) -> Tensor:
        return new_gradient(self.inputs[0], dtype)

    def _fields(
        self, item_scale: Tensor | None, losses: Tensor | None, grads: Grads, accumulate: bool
    ) -> tuple[Any, ...]:
        return (self.sample_weight, self.weight, item_scale, losses, *grads, accumulate)

    def _before(self, grads: Grads, overwrites: bool) -> None:
        # A look at all probabilities costs a pass, so the loss says whether it is needed; but not
        # where the kernel writes over what is the caller's.
        domain, first = self.loss.domain, grads[0]
        try:
            in_place = first is not None and first.data_ptr() == self.inputs[0].data_ptr()
            if domain != "probabilities" or overwrites or in_place:
                check_values(self.loss, self.inputs)
        except RuntimeError:  # of torch, about what is no plain tensor
            self.explain()
            raise

    def _after(self, result: Tensor | None) -> None:
        if self.loss.domain != "probabilities" or result is None:
            return
        if bool(result.isnan().any() if result.dim() else result != result):
            check_values(self.loss, self.inputs)
