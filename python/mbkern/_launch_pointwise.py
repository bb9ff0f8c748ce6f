"""From tensors to kernels: element-wise losses. See ``_launch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern import _C, _cuda
from mbkern._arguments import REDUCTIONS, Number, check_values, weights_as
from mbkern._launch import new_gradient, new_scalar, scalar_argument
from mbkern._losses import Loss
from mbkern._tensors import (
    CUDA_BUILT,
    describe,
    on_cuda,
    require_dtype,
    require_one_device,
    require_plain,
)

#: The tensors of a call that may be differentiated; what a loss does not have is None.
Inputs = tuple[Tensor, Tensor | None, Tensor | None]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(slots=True)
class TensorOptions:
    """What a loss over several tensors is asked for, besides them.

    Attributes:
        weight: multiplies each element, and does not count in the mean.
        sample_weight: multiplies each item; the mean divides by the sum.
        parameters: the loss's own numbers, in the order of its registry entry.
    """

    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    reduction: str = "mean"
    denominator: Number | None = None
    parameters: tuple[float, ...] = ()


class PointwiseCall:
    """One call of an element-wise loss: tensors of one (broadcast) shape."""

    __slots__ = ("inputs", "loss", "options", "sample_weight", "weight")

    def __init__(self, loss: Loss, inputs: Inputs, options: TensorOptions) -> None:
        self.loss = loss
        self.options = options
        self.inputs = inputs
        self.weight = self.sample_weight = None
        if options.weight is not None or options.sample_weight is not None:
            self.explain()
            self.weight = self._weights(options.weight, "weight")
            self.sample_weight = self._weights(options.sample_weight, "sample_weight")

    def _weights(self, given: Tensor | None, name: str) -> Tensor | None:
        if given is None:
            return None
        weight, shape = weights_as(given, name, self.compute), self.inputs[0].shape
        try:
            return weight.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"mbkern: {name} has shape {tuple(weight.shape)}, which does not "
                f"broadcast to the shape of the unreduced loss, {tuple(shape)}"
            ) from None

    @property
    def compute(self) -> torch.dtype:
        """The type that the loss is computed in."""
        double = any(t is not None and t.dtype is torch.float64 for t in self.inputs)
        return torch.float64 if double else torch.float32

    def explain(self) -> None:
        """Raise if these arguments are no loss; otherwise make the tensors plain."""
        names = self.loss.arguments
        first, *rest = (
            None if t is None else require_plain(t, name)
            for t, name in zip(self.inputs, (*names, "")[:3], strict=True)
        )
        assert first is not None
        self.inputs = (first, *rest)  # type: ignore[assignment]
        for t, name in zip(self.inputs, (*names, "")[:3], strict=True):
            if t is None:
                continue
            require_dtype(t, name)
            if t.shape != first.shape:
                raise ValueError(
                    f"mbkern: {names[0]} {tuple(first.shape)} and {name} {tuple(t.shape)} must be "
                    "broadcast to one shape"
                )

    def run(
        self,
        *,
        want_loss: bool = True,
        grads: Grads = (None, None, None),
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
        input = self.inputs[0]
        kernel, workspace, stream = _C.pointwise_loss, None, 0
        if CUDA_BUILT and on_cuda(input):
            kernel = _cuda.on_device_of(input, kernel)
            workspace = _cuda.new_workspace(input, input.numel(), self.compute is torch.float64)
            stream = _cuda.current_stream(input)
        losses = loss = None
        if want_loss:
            if reduction == "none":
                losses = new_gradient(input, loss_dtype)
            elif workspace is None:
                loss = new_scalar(loss_dtype)
            else:
                loss = input.new_empty((), dtype=loss_dtype)
        denominator: float | Tensor | None = divisor
        if divisor is not None:
            reduction = "mean"
        elif o.denominator is not None:
            denominator = scalar_argument(o.denominator, "denominator")
        if item_scale is not None:
            item_scale = item_scale.to(self.compute).expand(input.shape)
        rest = (
            self.sample_weight, self.weight, item_scale, losses, *grads, accumulate, o.parameters,
            scale, REDUCTIONS[reduction], denominator, loss, loss_sum, torch.get_num_threads(),
            workspace, stream,
        )  # fmt: skip
        has_domain = want_loss and workspace is None and self.loss.name in _WITH_DOMAIN
        # A look at all probabilities costs a pass, so the loss says whether it is needed; but not
        # where the kernel writes over what it would look at.
        probabilities = self.loss.name == "binary_cross_entropy"
        if has_domain and (not probabilities or accumulate or _overwrites(grads, input)):
            check_values(self.loss, self.inputs)
        done: float | Tensor | None = kernel((self.loss.number, *self.inputs, *rest))
        if done is None:
            done = self._retry(kernel, rest)
        if workspace is not None:
            done = workspace[0]
        result = losses if losses is not None else loss
        if has_domain and probabilities and _has_nan(result):
            check_values(self.loss, self.inputs)
        return result, done

    def _retry(self, kernel: Callable[..., float | None], rest: tuple[Any, ...]) -> float:
        """Say why the kernel returned None; or run it on copies, where more than eight dimensions
        that do not merge are the reason, or numbers in memory that CUDA would write over while it
        reads them."""
        self.explain()
        sample_weight, weight, item_scale, _, *grads = rest[:7]
        first, second, third = self.inputs
        names = (*self.loss.arguments, "")
        require_one_device(
            first,
            {"scale": rest[9], "denominator": rest[11]},
            {names[1]: second, names[2]: third, "sample_weight": sample_weight, "weight": weight,
             "the incoming gradient": item_scale, "loss_sum": rest[13],
             **{f"grad_out of {name}": g for name, g in zip(names, grads, strict=False)}},
        )  # fmt: skip
        views = (*self.inputs, *rest[:7])
        copies = [None if v is None else v.contiguous().resolve_neg() for v in views]
        numbers = [v.clone() if k in (9, 11) and isinstance(v, Tensor) else v
                   for k, v in enumerate(rest)]  # fmt: skip
        done = kernel((self.loss.number, *copies, *numbers[7:]))
        if done is None:
            described = ", ".join(
                f"{name} {describe(t)}"
                for name, t in zip(names, self.inputs, strict=False)
                if t is not None
            )
            raise NotImplementedError(f"mbkern: no kernel takes {described} with these options")
        for result, copy in zip(views[6:], copies[6:], strict=True):
            if result is not None and copy is not result:
                result.copy_(copy)
        return done


#: Losses that refuse some values of their inputs.
_WITH_DOMAIN = ("binary_cross_entropy", "gaussian_nll_loss")


def _overwrites(grads: Grads, input: Tensor) -> bool:
    return grads[0] is not None and grads[0].data_ptr() == input.data_ptr()


def _has_nan(result: Tensor | None) -> bool:
    return result is not None and bool(result.isnan().any() if result.dim() else result != result)
