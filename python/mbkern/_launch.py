"""From tensors to kernels: what all launches share, row losses and exact sums.

The compiled module reads the tensors itself, checks everything before it writes anything, and
returns None for what it cannot take. Only then is this file asked what is wrong: it raises, with
the values in the message, or makes plain, dense copies.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern import _C
from mbkern._arguments import (
    REDUCTIONS,
    Number,
    check_row_options,
    check_row_shapes,
    class_weight,
    weights_as,
)
from mbkern._tensors import (
    DTYPES,
    INDEX_TYPES,
    describe,
    require_dtype,
    require_plain,
)

_HUGE_PAGE_BYTES = 4 << 20  # below, the system call costs more than the page faults it saves
_SCALARS = {dtype: torch.zeros((), dtype=dtype) for dtype in DTYPES}


def read_torch(*, exchange: bool = True) -> bool:
    """Tell the compiled module how to read tensors; return whether by torch's exchange table."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None) if exchange else None
    return _C.set_torch((Tensor, torch.nn.Parameter), (*DTYPES, *INDEX_TYPES), table)


has_exchange_table = read_torch()


def scalar_argument(value: Number | None, name: str) -> float | Tensor:
    """Return a number or 0-dim tensor as what the kernels take; None is 1."""
    if value is None:
        return 1.0
    if not isinstance(value, Tensor):
        return float(value)
    tensor = require_plain(value.detach(), name)
    if tensor.dim() != 0:
        raise ValueError(
            f"mbkern: {name} must be a number or a 0-dim tensor, not {describe(tensor)}"
        )
    if tensor.dtype not in DTYPES:
        if tensor.is_complex():
            raise TypeError(f"mbkern: {name} is {tensor.dtype}; it must be a real number")
        tensor = tensor.to(torch.float64)
    return tensor


def new_scalar(dtype: torch.dtype) -> Tensor | None:
    """Allocate a 0-dim result, faster than ``torch.empty``; None for a dtype without kernels."""
    like = _SCALARS.get(dtype)
    return None if like is None else torch.empty_like(like)


def scale_dense(tensor: Tensor, factor: float, *, keep_zeros: bool = False) -> Tensor:
    """Multiply a tensor whose elements fill their memory, in place, rounding once.

    ``keep_zeros``: 0 stays 0 also where the factor is not finite; the gradient of an ignored item.
    """
    zeros = tensor == 0 if keep_zeros and not math.isfinite(factor) else None
    _C.scale_array(
        tensor.data_ptr(), DTYPES[tensor.dtype], tensor.numel(), factor, torch.get_num_threads()
    )
    return tensor if zeros is None else tensor.masked_fill_(zeros, 0.0)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor in another dtype, rounded once, with canonical NaNs."""
    if tensor.dtype is dtype:
        return tensor
    out = torch.empty(tensor.shape, dtype=dtype, device="cpu")
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
    """One call of a row loss: its tensors, with weights in the type computed in, and options."""

    __slots__ = ("input", "number", "options", "sample_weight", "target", "weight")

    def __init__(self, number: int, input: Tensor, target: Tensor, options: RowOptions) -> None:
        self.number = number
        self.options = options
        self.input = input
        self.target = target
        self.weight = self.sample_weight = None
        if options.weight is not None or options.sample_weight is not None:
            self.explain()
            if options.weight is not None:
                columns = input.shape[1 if input.dim() > 1 else 0]
                self.weight = class_weight(options.weight, columns, self.compute)
            if options.sample_weight is not None:
                weights = weights_as(options.sample_weight, "sample_weight", self.compute)
                self.sample_weight = self.per_item(weights, "sample_weight")

    @property
    def compute(self) -> torch.dtype:
        """The type that the loss is computed in."""
        return torch.float64 if self.input.dtype is torch.float64 else torch.float32

    @property
    def shape(self) -> torch.Size:
        """The shape of the unreduced loss."""
        shape = self.input.shape
        return shape[:1] + shape[2:] if len(shape) > 1 else torch.Size(())

    @property
    def has_index(self) -> bool:
        """Whether the target holds class indices, not class probabilities."""
        return self.target.shape != self.input.shape

    def new_state(self) -> Tensor:
        """Memory for what is saved of an item: maximum, sum of the other terms, and for class
        probabilities the sum of the coefficients."""
        rows = 2 if self.has_index else 3
        return torch.empty((rows, math.prod(self.shape)), dtype=self.compute, device="cpu")

    def per_item(self, values: Tensor, name: str) -> Tensor:
        """Broadcast one value an item to the shape of the unreduced loss."""
        try:
            return values.expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"mbkern: {name} has shape {tuple(values.shape)}, which does not "
                f"broadcast to the shape of the unreduced loss, {tuple(self.shape)}"
            ) from None

    def explain(self) -> None:
        """Raise if these arguments are no loss; otherwise make the tensors plain."""
        self.input = require_plain(self.input, "input")
        self.target = require_plain(self.target, "target")
        require_dtype(self.input, "input")
        check_row_shapes(self.input, self.target, self.options.ignore_index)
        check_row_options(self.options.label_smoothing, self.options.z_loss, self.options.softcap)

    def run(
        self,
        *,
        grad: Tensor | None = None,
        accumulate: bool = False,
        scale: float | Tensor = 1.0,
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
        dtype = loss_dtype or self.input.dtype
        denominator = (
            None if o.denominator is None else scalar_argument(o.denominator, "denominator")
        )
        if item_scale is not None:
            item_scale = self.per_item(item_scale.to(self.compute), "the incoming gradient")
        losses = loss = None
        if not from_state:
            if o.reduction == "none":
                losses = torch.empty(self.shape, dtype=self.compute, device="cpu")
            else:
                loss = new_scalar(dtype)

        fields = (
            self.number, self.input, self.target, self.weight, self.sample_weight, grad,
            item_scale, losses, state, accumulate, from_state, o.ignore_index, o.label_smoothing,
            o.z_loss, o.softcap, scale, divisor, REDUCTIONS[o.reduction], denominator, loss,
            loss_sum, torch.get_num_threads(),
        )  # fmt: skip
        done = _C.row_loss(fields)
        if done is None:
            done = self._retry(fields)
        if losses is not None:
            return converted(losses, dtype), done
        return loss, done

    def _retry(self, fields: tuple[Any, ...]) -> float:
        """Say why the kernel returned None; or run it on dense copies, where dimensions that do not
        merge are the reason."""
        self.explain()
        _, _, _, weight, sample_weight, grad, item_scale, *rest = fields
        copies = [
            None if t is None else t.contiguous().resolve_neg()
            for t in (self.input, self.target, weight, sample_weight, grad, item_scale)
        ]
        done = _C.row_loss((self.number, *copies, *rest))
        if done is None:
            raise NotImplementedError(
                f"mbkern: no kernel takes input {describe(self.input)} and target "
                f"{describe(self.target)} with these options"
            )
        if grad is not None and copies[4] is not grad:
            grad.copy_(copies[4])
        return done


# ---- exact sums ----------------------------------------------------------------------------------


def exact_result(state: Tensor, denominator: Number | None, dtype: torch.dtype) -> Tensor:
    """Round an exact sum, over ``denominator`` if given, to a 0-dim tensor."""
    out = torch.empty((), dtype=dtype, device="cpu")
    divisor = None if denominator is None else scalar_argument(denominator, "denominator")
    reduction = REDUCTIONS["sum" if divisor is None else "mean"]
    _C.exact_result(state.data_ptr(), (reduction, divisor, out, None))
    return out


def exact_merge(into: Tensor, other: Tensor) -> None:
    """Add one state to another; both end normalised."""
    _C.exact_merge(into.data_ptr(), other.data_ptr())


def exact_add(state: Tensor, values: Tensor) -> None:
    """Add every element of a tensor of at most 32 bits."""
    values = converted(values.contiguous(), torch.float32)
    _C.exact_add(state.data_ptr(), values.data_ptr(), values.numel())
