"""From tensors to kernels: losses over up to three tensors. See ``_launch``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern import _cuda
from mbkern._arguments import REDUCTIONS, Number, check_index, weights_as
from mbkern._launch import converted, new_scalar, scalar_argument
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
        target: class indices or labels an item, which are not differentiated; of losses whose item
            is a row.
        weight: of classes; or multiplies each element, and does not count in the mean.
        sample_weight: multiplies each item; the mean divides by the sum.
        ignore_index: items with this class index count nothing.
        parameters: the loss's own numbers, in the order of its registry entry.
    """

    target: Tensor | None = None
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    reduction: str = "mean"
    denominator: Number | None = None
    ignore_index: int = -100
    parameters: tuple[float, ...] = ()


class TensorCall:
    """One call of a loss over several tensors, which are of one shape."""

    __slots__ = ("inputs", "loss", "options", "sample_weight", "target", "weight")

    def __init__(self, loss: Loss, inputs: Inputs, options: TensorOptions) -> None:
        self.loss = loss
        self.options = options
        self.inputs = inputs
        self.target = options.target
        self.weight = self.sample_weight = None
        if options.weight is not None or options.sample_weight is not None:
            self.explain()
            if options.weight is not None:
                self.weight = self._weight(options.weight)
            if options.sample_weight is not None:
                self.sample_weight = self._per_item(options.sample_weight, "sample_weight")

    @property
    def compute(self) -> torch.dtype:
        """The type that the loss is computed in."""
        for t in self.inputs:
            if t is not None and t.dtype is torch.float64:
                return torch.float64
        return torch.float32

    @property
    def shape(self) -> torch.Size:
        """The shape of the unreduced loss."""
        raise NotImplementedError

    def explain(self) -> None:
        """Raise if these arguments are no loss; otherwise make the tensors plain."""
        names = self.loss.arguments
        first: Tensor | None = None
        plain = []
        for t, name in zip(self.inputs, (*names, "", "")[:3], strict=True):
            if t is not None:
                t = require_plain(t, name)
                require_dtype(t, name)
                first = t if first is None else first
                if t.shape != first.shape:
                    raise ValueError(
                        f"mbkern: {names[0]} {tuple(first.shape)} and {name} {tuple(t.shape)} must "
                        "be of one shape"
                    )
            plain.append(t)
        self.inputs = tuple(plain)  # type: ignore[assignment]

    def _weight(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _per_item(self, values: Tensor, name: str) -> Tensor:
        """Broadcast weights to the shape of the unreduced loss, in the type computed in."""
        weight = weights_as(values, name, self.compute)
        try:
            return weight.expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"mbkern: {name} has shape {tuple(weight.shape)}, which does not "
                f"broadcast to the shape of the unreduced loss, {tuple(self.shape)}"
            ) from None

    def _kernel(self) -> Callable[..., float | None]:
        raise NotImplementedError

    def _new_losses(self, dtype: torch.dtype) -> Tensor:
        """Memory for the unreduced loss."""
        raise NotImplementedError

    def _fields(
        self, item_scale: Tensor | None, losses: Tensor | None, grads: Grads, accumulate: bool
    ) -> tuple[Any, ...]:
        """What the kernel is called with, but for what :meth:`run` adds."""
        raise NotImplementedError

    def _before(self, grads: Grads, overwrites: bool) -> None:
        """Refuse values outside the loss's domain, before anything is written."""

    def _after(self, result: Tensor | None) -> None:
        """Refuse values outside the loss's domain, of which the result tells."""

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
        overwrites: bool = False,
    ) -> tuple[Tensor | None, float | Tensor]:
        """Run the kernel; return the loss and the divisor of a mean (``divisor``, if given), on
        CUDA a tensor. ``overwrites``: memory of the caller's, which stays as it is on an error."""
        o = self.options
        reduction = o.reduction
        input = self.inputs[0]
        kernel, workspace, stream = self._kernel(), None, 0
        if CUDA_BUILT and on_cuda(input):
            kernel = _cuda.on_device_of(input, kernel)
            workspace = _cuda.new_workspace(
                input, math.prod(self.shape), self.compute is torch.float64
            )
            stream = _cuda.current_stream(input)
        losses = loss = None
        if want_loss:
            if reduction == "none":
                losses = self._new_losses(loss_dtype)
            elif workspace is None:
                loss = new_scalar(loss_dtype)
            else:
                loss = input.new_empty((), dtype=loss_dtype)
            if workspace is None and self.loss.domain is not None:
                self._before(grads, overwrites)
        denominator: float | Tensor | None = divisor
        if divisor is not None:
            reduction = "mean"
        elif o.denominator is not None:
            denominator = scalar_argument(o.denominator, "denominator")
        if item_scale is not None:
            item_scale = item_scale.to(self.compute).expand(self.shape)
        fields = self._fields(item_scale, losses, grads, accumulate)
        rest = (
            o.parameters, scale, REDUCTIONS[reduction], denominator, loss, loss_sum,
            torch.get_num_threads(), workspace, stream,
        )  # fmt: skip
        try:
            done: float | Tensor | None = kernel((self.loss.number, *self.inputs, *fields, *rest))
        except (TypeError, OverflowError):
            check_index(o.ignore_index, "ignore_index")
            raise
        if done is None:
            done = self._retry(kernel, fields, rest, (losses, *grads))
        if workspace is not None:
            done = workspace[0]
        if want_loss and workspace is None and self.loss.domain is not None:
            self._after(loss if losses is None else losses)
        return (loss if losses is None else converted(losses, loss_dtype)), done

    def _retry(
        self,
        kernel: Callable[..., float | None],
        fields: tuple[Any, ...],
        rest: tuple[Any, ...],
        results: tuple[Tensor | None, ...],
    ) -> float:
        """Say why the kernel returned None; or run it on copies, where dimensions that do not merge
        are the reason, or numbers in memory that CUDA would write over while it reads them. Of the
        fields ``results`` alone are written to: others may be expanded, or not writeable."""
        check_index(self.options.ignore_index, "ignore_index")
        self.explain()
        names = self.loss.arguments
        first = self.inputs[0]
        require_one_device(
            first,
            {"scale": rest[1], "denominator": rest[3]},
            {**dict(zip((*names, "")[1:3], self.inputs[1:], strict=False)),
             "target": self.target, "sample_weight": self.sample_weight, "weight": self.weight,
             "loss_sum": rest[5],
             **{f"a tensor of the call ({k})": t for k, t in enumerate(fields)
                if isinstance(t, Tensor)}},
        )  # fmt: skip
        views = (*self.inputs, *fields)
        copies = [v.contiguous().resolve_neg() if isinstance(v, Tensor) else v for v in views]
        numbers = [v.clone() if k in (1, 3) and isinstance(v, Tensor) else v
                   for k, v in enumerate(rest)]  # fmt: skip
        done = kernel((self.loss.number, *copies, *numbers))
        if done is None:
            for name, t in zip(
                names, (*self.inputs[: self.loss.inputs], self.target), strict=False
            ):
                if t is None and name not in self.loss.optional:
                    raise TypeError(f"mbkern: {self.loss.name}: {name} must be a tensor, not None")
            described = ", ".join(
                f"{name} {describe(t)}"
                for name, t in zip(
                    names, (*self.inputs[: self.loss.inputs], self.target), strict=False
                )
                if t is not None
            )
            raise NotImplementedError(f"mbkern: no kernel takes {described} with these options")
        for field, copy in zip(fields, copies[len(self.inputs) :], strict=True):
            if copy is not field and any(field is result for result in results):
                field.copy_(copy)
        return done
