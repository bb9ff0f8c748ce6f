"""From checked tensors to kernels: what all launches share, row losses and exact sums.

This file and ``_launch_pointwise`` are the only ones that take addresses for the kernels. Every
check is made before anything is written; the kernels below check only class indices.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mbkern import _C
from mbkern._arguments import (
    REDUCTIONS,
    Number,
    class_weight,
    probabilities,
    refuse_indices,
    weights_as,
)
from mbkern._tensors import (
    DTYPES,
    INDEX_TYPES,
    Layout,
    describe,
    item_layout,
    require_dtype,
    require_plain,
)

ScalarArgument: TypeAlias = tuple[float, int, int]

ONE: ScalarArgument = (1.0, 0, 0)
_NO_LAYOUT: Layout = (0, 0, 0)
_F64 = DTYPES[torch.float64]
_HUGE_PAGE_BYTES = 4 << 20  # below, the system call costs more than the page faults it saves


def scalar_argument(value: Number | None, name: str) -> tuple[ScalarArgument, Tensor | None]:
    """Return a number or 0-dim tensor as (value, address, dtype), and the tensor to keep alive."""
    if value is None:
        return ONE, None
    if isinstance(value, Tensor):
        tensor = require_plain(value.detach(), name)
        if tensor.dim() != 0:
            raise ValueError(
                f"mbkern: {name} must be a number or a 0-dim tensor, not {describe(tensor)}"
            )
        if tensor.dtype not in DTYPES:
            if tensor.is_complex():
                raise TypeError(f"mbkern: {name} is {tensor.dtype}; it must be a real number")
            tensor = tensor.to(torch.float64)
        return (0.0, tensor.data_ptr(), DTYPES[tensor.dtype]), tensor
    return (float(value), 0, 0), None


def scalar_value(tensor: Tensor, name: str) -> float:
    """Read a 0-dim CPU tensor; a fraction of the time of ``float(tensor)``."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        return float(tensor)
    return _C.scalar_value(require_plain(tensor, name).data_ptr(), dtype)


def scale_dense(tensor: Tensor, factor: float) -> Tensor:
    """Multiply a tensor whose elements fill their memory, in place, rounding once."""
    _C.scale_array(
        tensor.data_ptr(), DTYPES[tensor.dtype], tensor.numel(), factor, torch.get_num_threads()
    )
    return tensor


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor in another dtype, rounded once, with canonical NaNs."""
    if tensor.dtype is dtype:
        return tensor
    out = torch.empty(tensor.shape, dtype=dtype)
    _C.convert_array(
        tensor.data_ptr(), DTYPES[tensor.dtype], out.data_ptr(), DTYPES[dtype], tensor.numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def zeros_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a gradient of zeros, without torch's thread pool."""
    grad = new_gradient(like, dtype)
    ctypes.memset(grad.data_ptr(), 0, grad.nbytes)
    return grad


def new_gradient(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a gradient, in ``like``'s layout if that is dense; huge pages where they pay."""
    grad = torch.empty_like(like, dtype=dtype)
    size = grad.nbytes
    if size >= _HUGE_PAGE_BYTES:
        _C.advise_huge_pages(grad.data_ptr(), size)
    return grad


# ---- row losses ----------------------------------------------------------------------------------


@dataclass(slots=True)
class RowOptions:
    """What a row loss is asked for, besides its input and target."""

    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    reduction: str = "mean"
    denominator: Number | None = None


class RowCall:
    """The checked, addressable form of one call of a row loss. Holds its tensors alive."""

    __slots__ = (
        "columns", "compute", "dtype", "has_index", "inner", "input", "input_layout", "items",
        "number", "options", "sample_layout", "sample_weight", "shape", "target", "target_layout",
        "target_type", "weight",
    )  # fmt: skip

    def __init__(self, number: int, input: Tensor, target: Tensor, options: RowOptions) -> None:
        self.number = number
        self.options = options
        input = require_plain(input, "input")
        target = require_plain(target, "target")
        self.dtype = require_dtype(input, "input")
        self.compute = torch.float64 if self.dtype == _F64 else torch.float32
        shape = input.shape
        dims = len(shape)
        if dims == 2:
            items, self.columns = shape
            self.shape, self.items, self.inner = shape[:1], items, 1
        elif dims == 0:
            raise ValueError(
                "mbkern: input must have a class dimension: (C), (N, C) or (N, C, d1, ...), not ()"
            )
        else:
            self.columns = shape[1 if dims > 1 else 0]
            self.shape = torch.Size(()) if dims == 1 else shape[:1] + shape[2:]
            self.items, self.inner = math.prod(self.shape), math.prod(self.shape[1:])
        self.has_index = target.shape != shape
        if self.has_index:
            index_type = INDEX_TYPES.get(target.dtype)
            if index_type is None or target.shape != self.shape:
                refuse_indices(target, shape, self.shape)
            self.target_type: int = index_type  # type: ignore[assignment]
        else:
            target = probabilities(target, input, options.ignore_index)
            self.target_type = -1
        if dims == 2 and self.has_index:  # the common case, without the calls
            self.input, self.target = input, target
            rows, columns = input.stride()
            self.input_layout = (rows, 0, columns)
            self.target_layout = (target.stride()[0], 0, 0)
        else:
            self.input, self.input_layout = _mergeable(input, True)
            self.target, self.target_layout = _mergeable(target, not self.has_index)

        self.weight = self.sample_weight = None
        self.sample_layout = _NO_LAYOUT
        if options.weight is not None:
            self.weight = class_weight(options.weight, self.columns, self.compute)
        if options.sample_weight is not None:
            weights = weights_as(options.sample_weight, "sample_weight", self.compute)
            self.sample_weight, self.sample_layout = self.per_item(weights, "sample_weight")
        if not 0.0 <= options.label_smoothing <= 1.0:
            raise ValueError(
                f"mbkern: label_smoothing must be in [0, 1], not {options.label_smoothing}"
            )
        if options.softcap is not None and not 0.0 < options.softcap < math.inf:
            raise ValueError(f"mbkern: softcap must be positive and finite, not {options.softcap}")

    def per_item(self, values: Tensor, name: str) -> tuple[Tensor, Layout]:
        """Broadcast one value an item to the shape of the unreduced loss."""
        try:
            values = values.expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"mbkern: {name} has shape {tuple(values.shape)}, which does not "
                f"broadcast to the shape of the unreduced loss, {tuple(self.shape)}"
            ) from None
        return _mergeable(values, False)

    def state_rows(self) -> int:
        """Saved values an item: maximum, sum of the other terms, sum of the coefficients."""
        return 2 if self.has_index else 3

    def run(
        self,
        *,
        grad: Tensor | None = None,
        accumulate: bool = False,
        scale: ScalarArgument = ONE,
        item_scale: Tensor | None = None,
        state: Tensor | None = None,
        from_state: bool = False,
        divisor: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        loss_sum: Tensor | None = None,
    ) -> tuple[Tensor | None, float]:
        """Run the kernel; return the loss and the divisor of a mean.

        ``from_state`` is the backward half: no loss, the gradient from the saved state, over
        ``divisor``.
        """
        o = self.options
        input = self.input
        none = o.reduction == "none"
        losses = loss = None
        dtype = loss_dtype or input.dtype
        loss_address = losses_address = 0
        if not from_state:
            if none:
                losses = torch.empty(self.shape, dtype=self.compute)
                losses_address = losses.data_ptr()
            else:
                loss = torch.empty((), dtype=dtype)
                loss_address = loss.data_ptr()
        denominator, keep = (
            (ONE, None) if o.denominator is None else scalar_argument(o.denominator, "denominator")
        )

        target_grad = grad
        grad_layout = _NO_LAYOUT
        if grad is not None:
            if grad.stride() == input.stride():
                grad_layout = self.input_layout
            else:
                grad, grad_layout = _mergeable(grad, True)
        scale_layout = _NO_LAYOUT
        if item_scale is not None:
            item_scale, scale_layout = self.per_item(
                item_scale.to(self.compute), "the incoming gradient"
            )
        weight, sample_weight = self.weight, self.sample_weight
        divisor = _C.row_loss(
            (
                self.number, self.dtype, self.items, self.inner, self.columns,
                input.data_ptr(), *self.input_layout,
                0 if grad is None else grad.data_ptr(), *grad_layout, accumulate,
                self.target.data_ptr(), self.target_type, *self.target_layout, o.ignore_index,
                0 if weight is None else weight.data_ptr(),
                0 if sample_weight is None else sample_weight.data_ptr(), *self.sample_layout,
                scale[1], scale[2],
                0 if item_scale is None else item_scale.data_ptr(), *scale_layout,
                losses_address, 0 if state is None else state.data_ptr(), from_state,
                REDUCTIONS[o.reduction], o.denominator is not None, denominator[1], denominator[2],
                loss_address, DTYPES[dtype], 0 if loss_sum is None else loss_sum.data_ptr(),
                torch.get_num_threads(),
            ),
            (o.label_smoothing, o.z_loss, o.softcap or 0.0, scale[0], divisor, denominator[0]),
        )  # fmt: skip
        del keep
        if target_grad is not None and target_grad is not grad:
            target_grad.copy_(grad)  # type: ignore[arg-type]
        if losses is not None:
            return converted(losses, dtype), divisor
        return loss, divisor


def _mergeable(tensor: Tensor, class_dim: bool) -> tuple[Tensor, Layout]:
    """Return the tensor and its layout; through a dense copy where dimensions do not merge."""
    layout = item_layout(tensor, class_dim)
    if layout is None:
        tensor = tensor.contiguous()
        layout = item_layout(tensor, class_dim)
        assert layout is not None
    return tensor, layout


# ---- exact sums ----------------------------------------------------------------------------------


def exact_result(state: Tensor, denominator: Number | None, dtype: torch.dtype) -> Tensor:
    """Round an exact sum, over ``denominator`` if given, to a 0-dim tensor."""
    out = torch.empty((), dtype=dtype)
    argument, keep = scalar_argument(denominator, "denominator")
    reduction = REDUCTIONS["sum" if denominator is None else "mean"]
    _C.exact_result(
        state.data_ptr(),
        (
            reduction,
            denominator is not None,
            argument[1],
            argument[2],
            out.data_ptr(),
            DTYPES[dtype],
            0,
        ),
        (argument[0],),
    )
    del keep
    return out


def exact_merge(into: Tensor, other: Tensor) -> None:
    """Add one state to another; both end normalised."""
    _C.exact_merge(into.data_ptr(), other.data_ptr())


def exact_add(state: Tensor, values: Tensor) -> None:
    """Add every element of a tensor of at most 32 bits."""
    values = converted(values.contiguous(), torch.float32)
    _C.exact_add(state.data_ptr(), values.data_ptr(), values.numel())
