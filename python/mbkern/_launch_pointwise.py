"""From tensors to kernels: element-wise losses. See ``_launch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern import _C, _cuda
from mbkern._arguments import REDUCTIONS, Number, weights_as
from mbkern._launch import new_gradient, new_scalar, scalar_argument
from mbkern._tensors import (
    CUDA_BUILT,
    describe,
    on_cuda,
    require_dtype,
    require_one_device,
    require_plain,
)


@dataclass(slots=True)
class PointwiseOptions:
    """What an element-wise loss is asked for, besides its input and target."""

    weight: Tensor | None = None
    reduction: str = "mean"
    denominator: Number | None = None
    parameter: float = 0.0


class PointwiseCall:
    """One call of an element-wise loss: tensors of one (broadcast) shape."""

    __slots__ = ("input", "number", "options", "target", "weight")

    def __init__(
        self, number: int, input: Tensor, target: Tensor, options: PointwiseOptions
    ) -> None:
        self.number = number
        self.options = options
        self.input = input
        self.target = target
        self.weight = None
        if options.weight is not None:
            self.explain()
            weight = weights_as(options.weight, "weight", self.compute)
            try:
                self.weight = weight.expand(input.shape)
            except RuntimeError:
                raise ValueError(
                    f"mbkern: weight has shape {tuple(weight.shape)}, which does not "
                    f"broadcast to the shape of the unreduced loss, {tuple(input.shape)}"
                ) from None

    @property
    def compute(self) -> torch.dtype:
        """The type that the loss is computed in."""
        double = torch.float64 in (self.input.dtype, self.target.dtype)
        return torch.float64 if double else torch.float32

    def explain(self) -> None:
        """Raise if these arguments are no loss; otherwise make the tensors plain."""
        self.input = input = require_plain(self.input, "input")
        self.target = target = require_plain(self.target, "target")
        require_dtype(input, "input")
        require_dtype(target, "target")
        if input.shape != target.shape:
            raise ValueError(
                f"mbkern: input {tuple(input.shape)} and target {tuple(target.shape)} must be "
                "broadcast to one shape"
            )

    def run(
        self,
        *,
        want_loss: bool = True,
        grads: tuple[Tensor | None, Tensor | None] = (None, None),
        accumulate: bool = False,
        scale: float | Tensor = 1.0,
        item_scale: Tensor | None = None,
        divisor: float | Tensor | None = None,
        loss_dtype: torch.dtype,
        loss_sum: Tensor | None = None,
    ) -> tuple[Tensor | None, float | Tensor]:
        """Run the kernel; return the loss and the divisor of a mean (``divisor``, if given), on
        CUDA a tensor."""
        o = self.options
        reduction = o.reduction
        kernel, workspace, stream = _C.pointwise_loss, None, 0
        if CUDA_BUILT and on_cuda(self.input):
            kernel = _cuda.on_device_of(self.input, kernel)
            workspace = _cuda.new_workspace(
                self.input, self.input.numel(), self.compute is torch.float64
            )
            stream = _cuda.current_stream(self.input)
        losses = loss = None
        if want_loss:
            if reduction == "none":
                losses = new_gradient(self.input, loss_dtype)
            elif workspace is None:
                loss = new_scalar(loss_dtype)
            else:
                loss = self.input.new_empty((), dtype=loss_dtype)
        denominator: float | Tensor | None = divisor
        if divisor is not None:
            reduction = "mean"
        elif o.denominator is not None:
            denominator = scalar_argument(o.denominator, "denominator")
        if item_scale is not None:
            item_scale = item_scale.to(self.compute).expand(self.input.shape)
        rest = (
            self.weight, item_scale, losses, *grads, accumulate, o.parameter, scale,
            REDUCTIONS[reduction], denominator, loss, loss_sum, torch.get_num_threads(), workspace,
            stream,
        )  # fmt: skip
        done: float | Tensor | None = kernel((self.number, self.input, self.target, *rest))
        if done is None:
            done = self._retry(kernel, rest)
        if workspace is not None:
            done = workspace[0]
        return (losses if losses is not None else loss), done

    def _retry(self, kernel: Callable[..., float | None], rest: tuple[Any, ...]) -> float:
        """Say why the kernel returned None; or run it on copies, where more than eight dimensions
        that do not merge are the reason, or numbers in memory that CUDA would write over while it
        reads them."""
        self.explain()
        weight, item_scale, _, *grads = rest[:5]
        require_one_device(
            self.input,
            {"scale": rest[7], "denominator": rest[9]},
            {"target": self.target, "weight": weight, "the incoming gradient": item_scale,
             "grad_out": grads[0], "the target's grad_out": grads[1], "loss_sum": rest[11]},
        )  # fmt: skip
        views = (self.input, self.target, *rest[:5])
        copies = [None if v is None else v.contiguous().resolve_neg() for v in views]
        numbers = [v.clone() if k in (7, 9) and isinstance(v, Tensor) else v
                   for k, v in enumerate(rest)]  # fmt: skip
        done = kernel((self.number, *copies, *numbers[5:]))
        if done is None:
            raise NotImplementedError(
                f"mbkern: no kernel takes input {describe(self.input)} and target "
                f"{describe(self.target)} with these options"
            )
        for result, copy in zip(views[4:], copies[4:], strict=True):
            if result is not None and copy is not result:
                result.copy_(copy)
        return done
