"""From checked tensors to kernels: the only file that takes addresses.

Every check is made here, before anything is written; the kernels below check only class indices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mbkern import _C
from mbkern._tensors import (
    DTYPES,
    INDEX_TYPES,
    Layout,
    byte_range,
    describe,
    has_internal_overlap,
    item_layout,
    require_dtype,
    require_plain,
    same_elements,
    share_memory,
)

Number: TypeAlias = "float | int | Tensor"
ScalarArgument: TypeAlias = tuple[float, int, int]

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
ONE: ScalarArgument = (1.0, 0, 0)
_NO_LAYOUT: Layout = (0, 0, 0)
_F64 = DTYPES[torch.float64]
_HUGE_PAGE_BYTES = 4 << 20  # below, the system call costs more than the page faults it saves


def scalar_argument(value: Number | None, name: str) -> tuple[ScalarArgument, Tensor | None]:
    """Turn a number or a 0-dim tensor into (value, address, dtype), and the tensor to keep alive."""
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


def new_gradient(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a gradient, in ``like``'s layout if that is dense; huge pages where they pay."""
    grad = torch.empty_like(like, dtype=dtype)
    size = grad.nbytes
    if size >= _HUGE_PAGE_BYTES:
        _C.advise_huge_pages(grad.data_ptr(), size)
    return grad


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that a storage type is computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_output(
    grad: Tensor, name: str, input: Tensor, accumulate: bool, others: tuple[Tensor | None, ...]
) -> None:
    """Refuse an output that the gradient of ``input`` cannot be written to, with the reason."""
    require_plain(grad, name)
    wanted = compute_dtype(input.dtype) if accumulate else input.dtype
    if grad.shape != input.shape or grad.dtype != wanted:
        raise ValueError(
            f"mbkern: {name} must be {tuple(input.shape)} {wanted}, not {describe(grad)}"
        )
    if has_internal_overlap(grad):
        raise ValueError(
            f"mbkern: {name} has elements that share memory (shape {tuple(grad.shape)}, "
            f"strides {grad.stride()}); give it memory of its own"
        )
    if share_memory(grad, input):
        if accumulate:
            raise ValueError(
                f"mbkern: {name} shares memory with the input, which cannot be accumulated into"
            )
        if not same_elements(grad, input):
            raise ValueError(f"mbkern: {name} overlaps the input without being the input")
    for other in others:
        if other is not None and share_memory(grad, other):
            raise ValueError(f"mbkern: {name} overlaps another argument, {describe(other)}")


# ---- row losses ---------------------------------------------------------------------------------------


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
        "columns", "compute", "dtype", "has_index", "inner", "input", "input_layout", "items", "number",
        "options", "sample_layout", "sample_weight", "shape", "target", "target_layout", "target_type", "weight",
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
                _refuse_indices(target, shape, self.shape)
            self.target_type: int = index_type  # type: ignore[assignment]
        else:
            target = _probabilities(target, input, options.ignore_index)
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
            self.weight = _class_weight(options.weight, self.columns, self.compute)
        if options.sample_weight is not None:
            weights = (
                require_plain(options.sample_weight, "sample_weight").detach().to(self.compute)
            )
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
                f"mbkern: {name} has shape {tuple(values.shape)}, which does not broadcast to the shape of the "
                f"unreduced loss, {tuple(self.shape)}"
            ) from None
        return _mergeable(values, False)

    def state_rows(self) -> int:
        """Saved values an item: the maximum, the sum of the other terms, the sum of the coefficients."""
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

        ``from_state`` is the backward half: no loss, the gradient from the saved state, over ``divisor``.
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
            return (losses if dtype is losses.dtype else losses.to(dtype)), divisor
        return loss, divisor


def _mergeable(tensor: Tensor, class_dim: bool) -> tuple[Tensor, Layout]:
    """Return the tensor and its layout; through a dense copy where dimensions do not merge."""
    layout = item_layout(tensor, class_dim)
    if layout is None:
        tensor = tensor.contiguous()
        layout = item_layout(tensor, class_dim)
        assert layout is not None
    return tensor, layout


def _refuse_indices(target: Tensor, shape: torch.Size, wanted: torch.Size) -> None:
    if target.shape != wanted:
        raise ValueError(
            f"mbkern: target has shape {tuple(target.shape)}; for an input of {tuple(shape)} it must be "
            f"{tuple(wanted)} (class indices) or {tuple(shape)} (class probabilities)"
        )
    raise TypeError(
        f"mbkern: class indices are {target.dtype}; supported are int64, int32, int16, int8 and uint8"
    )


def _probabilities(target: Tensor, input: Tensor, ignore_index: int) -> Tensor:
    if not target.is_floating_point():
        raise TypeError(
            f"mbkern: a target of the input's shape holds class probabilities and must be floating, not {target.dtype}"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"mbkern: ignore_index={ignore_index} has no meaning for a target of class probabilities"
        )
    return target if target.dtype is input.dtype else target.to(input.dtype)


def _class_weight(weight: Tensor, columns: int, compute: torch.dtype) -> Tensor:
    weight = require_plain(weight, "weight")
    require_dtype(weight, "weight")
    if weight.shape != (columns,):
        raise ValueError(
            f"mbkern: weight must have one entry for each of the {columns} classes, not shape {tuple(weight.shape)}"
        )
    return weight.detach().to(compute).contiguous()


# ---- element-wise losses ------------------------------------------------------------------------------


@dataclass(slots=True)
class PointwiseOptions:
    """What an element-wise loss is asked for, besides its input and target."""

    weight: Tensor | None = None
    reduction: str = "mean"
    denominator: Number | None = None
    parameter: float = 0.0


class PointwiseCall:
    """The checked form of one call of an element-wise loss: input and target of one (broadcast) shape."""

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
                f"mbkern: input {tuple(input.shape)} and target {tuple(target.shape)} must be broadcast to one shape"
            )
        self.shape = input.shape
        both = torch.promote_types(input.dtype, target.dtype)
        self.compute = compute_dtype(both)
        self.weight = None
        if options.weight is not None:
            weight = require_plain(options.weight, "weight").detach().to(self.compute)
            try:
                self.weight = weight.expand(self.shape)
            except RuntimeError:
                raise ValueError(
                    f"mbkern: weight has shape {tuple(weight.shape)}, which does not broadcast to the shape of "
                    f"the unreduced loss, {tuple(self.shape)}"
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
        """Run the kernel; return the loss and the divisor of a mean (``divisor``, if that is given)."""
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
                denominator[1], denominator[2], 0 if loss is None else loss.data_ptr(), DTYPES[loss_dtype],
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


# ---- exact sums ---------------------------------------------------------------------------------------


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
    """Add every element of a contiguous float32 tensor."""
    _C.exact_add(state.data_ptr(), values.data_ptr(), values.numel())


__all__ = ["PointwiseCall", "PointwiseOptions", "RowCall", "RowOptions", "byte_range"]
