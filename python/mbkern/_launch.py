"""From tensors to kernels: what all launches share, row losses and exact sums.

The compiled module reads the tensors itself, checks everything before it writes anything, and
returns None for what it cannot take. Only then is this file asked what is wrong: it raises, with
the values in the message, or makes plain, dense copies.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern import _C, _cuda
from mbkern._arguments import (
    REDUCTIONS,
    Number,
    check_index,
    check_row_options,
    check_row_shapes,
    class_weight,
    hint_value,
    weights_as,
)
from mbkern._losses import as_number
from mbkern._tensors import (
    CUDA_BUILT,
    DTYPES,
    INDEX_TYPES,
    describe,
    has_internal_overlap,
    on_cuda,
    require_dtype,
    require_one_device,
    require_plain,
)

HUGE_PAGE_BYTES = 4 << 20  # below, the system call costs more than the page faults it saves
SCALARS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in DTYPES}


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
        if type(value) is float:
            return value
        return as_number(value, name, " or a 0-dim tensor")
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


def hint_argument(hint: Number) -> float | Tensor:
    """Return grad_scale as what can be divided out again, or raise.

    A tensor on CUDA is copied there, and its value not looked at: should it be 0 or not finite, so
    are the gradients not finite.
    """
    if isinstance(hint, Tensor) and on_cuda(hint):
        return scalar_argument(hint, "grad_scale").clone()  # type: ignore[union-attr]
    return hint_value(hint)


def new_scalar(dtype: torch.dtype) -> Tensor | None:
    """Allocate a 0-dim result, faster than ``torch.empty``; None for a dtype without kernels."""
    like = SCALARS.get(dtype)
    return None if like is None else torch.empty_like(like)


def rescale_on_device(
    grad: Tensor, incoming: Tensor, hint: float | Tensor, *, keep_zeros: bool = False
) -> Tensor:
    """Multiply a gradient on CUDA by incoming / hint, in place; nobody looks at the factor but the
    device, which does not touch the gradient where it is 1."""
    scale = scalar_argument(incoming, "the incoming gradient")
    dense = grad if _fills_its_memory(grad) else grad.contiguous()
    kernel = _cuda.on_device_of(grad, _C.cuda_scale_array)
    kernel((dense, scale, hint, keep_zeros, _cuda.current_stream(grad)))
    return grad if dense is grad else grad.copy_(dense)


def _fills_its_memory(tensor: Tensor) -> bool:
    span = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    return tensor.is_contiguous() or (span == tensor.numel() and not has_internal_overlap(tensor))


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
    out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if on_cuda(tensor):
        kernel = _cuda.on_device_of(tensor, _C.cuda_convert_array)
        kernel((tensor, out, _cuda.current_stream(tensor)))
        return out
    _C.convert_array(
        tensor.data_ptr(), DTYPES[tensor.dtype], out.data_ptr(), DTYPES[dtype], tensor.numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def zeros_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a gradient of zeros, without torch's thread pool."""
    grad = new_gradient(like, dtype)
    if on_cuda(grad):
        return grad.zero_()
    ctypes.memset(grad.data_ptr(), 0, grad.nbytes)
    return grad


def new_gradient(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a gradient, in ``like``'s layout if that is dense; huge pages where they pay."""
    return in_huge_pages(
        torch.empty_like(like) if dtype is None else torch.empty_like(like, dtype=dtype)
    )


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Ask for huge pages under memory that has not been touched yet, where they pay."""
    size = fresh.nbytes
    if size >= HUGE_PAGE_BYTES and fresh.is_cpu:
        _C.advise_huge_pages(fresh.data_ptr(), size)
    return fresh


def new_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros that the system fills in at the first touch, if it can."""
    return in_huge_pages(torch.zeros(shape, dtype=dtype, device=device))


def bump_version(tensor: Tensor) -> None:
    """Tell autograd that a kernel has written to a tensor."""
    torch.autograd.graph.increment_version(tensor)
    if tensor._base is not None:
        # Reading it brings the history of a view up to date; torch crashes in a later
        # register_hook otherwise. A view made under no_grad has none, and torch refuses to look.
        with suppress(RuntimeError):
            _ = tensor.grad_fn


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
        shape = (rows, math.prod(self.shape))
        return torch.empty(shape, dtype=self.compute, device=self.input.device)

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
        check_index(self.options.ignore_index, "ignore_index")
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
        divisor: float | Tensor = 1.0,
        loss_dtype: torch.dtype | None = None,
        loss_sum: Tensor | None = None,
    ) -> tuple[Tensor | None, float | Tensor]:
        """Run the kernel; return the loss and the divisor of a mean, on CUDA a tensor.

        ``from_state`` is the backward half: no loss, the gradient from the saved state, over
        ``divisor``.
        """
        o = self.options
        dtype = loss_dtype or self.input.dtype
        kernel, workspace, stream = _C.row_loss, None, 0
        if CUDA_BUILT and on_cuda(self.input):
            kernel = _cuda.on_device_of(self.input, kernel)
            workspace = _cuda.new_workspace(
                self.input, math.prod(self.shape), self.compute is torch.float64
            )
            stream = _cuda.current_stream(self.input)
        denominator = (
            None if o.denominator is None else scalar_argument(o.denominator, "denominator")
        )
        if item_scale is not None:
            item_scale = self.per_item(item_scale.to(self.compute), "the incoming gradient")
        losses = loss = None
        if not from_state:
            if o.reduction == "none":
                losses = torch.empty(self.shape, dtype=self.compute, device=self.input.device)
            elif workspace is None:
                loss = new_scalar(dtype)
            else:
                loss = self.input.new_empty((), dtype=dtype)

        fields = (
            self.number, self.input, self.target, self.weight, self.sample_weight, grad,
            item_scale, losses, state, accumulate, from_state, o.ignore_index, o.label_smoothing,
            o.z_loss, o.softcap, scale, divisor, REDUCTIONS[o.reduction], denominator, loss,
            loss_sum, torch.get_num_threads(), workspace, stream,
        )  # fmt: skip
        try:
            done: float | Tensor | None = kernel(fields)
        except (TypeError, OverflowError):  # of a number that is none, or has no end
            self.explain()
            raise
        if done is None:
            done = self._retry(kernel, fields)
        if workspace is not None:
            done = workspace[0]
        if losses is not None:
            return converted(losses, dtype), done
        return loss, done

    def _retry(self, kernel: Callable[..., float | None], fields: tuple[Any, ...]) -> float:
        """Say why the kernel returned None; or run it on copies, where dimensions that do not merge
        are the reason, or numbers in memory that CUDA would write over while it reads them."""
        self.explain()
        _, _, _, weight, sample_weight, grad, item_scale, *rest = fields
        require_one_device(
            self.input,
            {"scale": rest[8], "divisor": rest[9], "denominator": rest[11]},
            {"target": self.target, "weight": weight, "sample_weight": sample_weight,
             "grad_out": grad, "the incoming gradient": item_scale, "loss_sum": rest[13]},
        )  # fmt: skip
        copies = [
            None if t is None else t.contiguous().resolve_neg()
            for t in (self.input, self.target, weight, sample_weight, grad, item_scale)
        ]
        for k in (8, 11):
            rest[k] = rest[k].clone() if isinstance(rest[k], Tensor) else rest[k]
        done = kernel((self.number, *copies, *rest))
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
    out = torch.empty((), dtype=dtype, device=state.device)
    require_dtype(out, "the result")
    divisor = None if denominator is None else scalar_argument(denominator, "denominator")
    require_one_device(state, {"denominator": divisor}, {})
    fields = (REDUCTIONS["sum" if divisor is None else "mean"], divisor, out, None)
    if on_cuda(state):
        _exact_on_device(_C.cuda_exact_result, state, *fields)
    else:
        _C.exact_result(state.data_ptr(), fields)
    return out


def exact_merge(into: Tensor, other: Tensor) -> None:
    """Add one state to another on its device; both end normalised."""
    if on_cuda(into):
        _exact_on_device(_C.cuda_exact_merge, into, other)
    else:
        _C.exact_merge(into.data_ptr(), other.data_ptr())


def exact_add(state: Tensor, values: Tensor) -> None:
    """Add every element of a tensor of at most 32 bits."""
    require_one_device(state, {}, {"values": values})
    values = converted(values.contiguous(), torch.float32)
    if on_cuda(state):
        _exact_on_device(_C.cuda_exact_add, state, values, items=values.numel())
    else:
        _C.exact_add(state.data_ptr(), values.data_ptr(), values.numel())


def _exact_on_device(
    kernel: Callable[..., None], state: Tensor, *fields: Any, items: int = 0
) -> None:
    workspace = _cuda.new_workspace(state, items)
    kernel = _cuda.on_device_of(state, kernel)
    kernel((state, *fields, workspace, _cuda.current_stream(state)))
