"""From lists of tensors to kernels. The compiled module checks all tensors and writes nothing if
one is not suited; only then is it asked here, which one and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from mbkern import _C, _cuda
from mbkern._arguments import Number
from mbkern._launch import scalar_argument
from mbkern._tensors import (
    byte_range,
    describe,
    has_internal_overlap,
    on_cuda,
    require_dtype,
    require_one_device,
    require_plain,
    same_elements,
)

_WIDENED = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
_MAX_DIMS = 8
_LIST_BLOCK = 4096  # csrc/core/tensor_list.h


def _takes_lists() -> bool:
    try:
        torch.autograd.graph.increment_version([])
    except (TypeError, AttributeError):  # an older torch
        return False
    return True


_VERSIONS_OF_LISTS = _takes_lists()


def accumulate(
    buffers: list[Tensor],
    grads: list[Tensor],
    alpha: Number,
    beta: Number,
    squares: Tensor | None,
    low: list[Tensor | None] | None = None,
    keys: list[int] | None = None,
) -> bool:
    """buffers = beta * buffers + alpha * grads; squares: (len,) float64 for the grads' norms.

    Of bfloat16 buffers, low: what they cannot hold; keys: of their random rounding instead.
    Returns False, with nothing written, for what no kernel takes.
    """
    if not buffers and not grads:
        return True
    scalars = (scalar_argument(alpha, "alpha"), scalar_argument(beta, "beta"))
    fields = (buffers, grads, low, keys, *scalars, squares)
    if _call(_C.accumulate, buffers, fields, squares is not None) is None:
        return False
    _changed(buffers)
    if low is not None:
        _changed([tensor for tensor in low if tensor is not None])
    return True


def explain_accumulate(
    buffers: list[Tensor],
    grads: list[Tensor],
    alpha: Number,
    beta: Number,
    low: list[Tensor | None] | None,
    keys: list[int] | None,
) -> NoReturn:
    """Raise for what :func:`accumulate` does not take."""
    _explain_lists(buffers, grads, "grads")
    lows: Sequence[Any] = [None] * len(buffers) if low is None else low
    for k, (buffer, grad) in enumerate(zip(buffers, grads, strict=True)):
        _explain_pair(buffer, grad, k)
        _explain_low(buffer, lows[k], k, needed=keys is None)
    written = _named(buffers, "buffers") + _named(lows, "compensation")
    _explain_overlap(_named(grads, "grads"), written)
    _explain_rest(buffers, {"alpha": alpha, "beta": beta})


@dataclass(frozen=True)
class FlushTo:
    """What a flush writes and reads besides the buffers; the lists are as long as those are.

    Attributes:
        grads: what is written; None: nothing.
        parameters: of the penalties; None where there is none.
        low: what bfloat16 buffers cannot hold; None where there is none.
        l1, l2: the penalties, one number for all or one for each.
        stats: (4,) float64: norm, clip factor, whether not finite, penalty.
        squares: (len,) float64.
    """

    grads: list[Tensor | None]
    parameters: list[Tensor | None]
    low: list[Tensor | None] | None
    l1: float | list[float]
    l2: float | list[float]
    stats: Tensor
    squares: Tensor


def flush(
    buffers: list[Tensor], to: FlushTo, scale: tuple[Number, Number, Number], max_norm: float
) -> None:
    """grads = clip * (factor / (denominator * grad_scale) * buffers + penalties' gradients)."""
    names = ("factor", "denominator", "grad_scale")
    numbers = [scalar_argument(value, name) for value, name in zip(scale, names, strict=True)]
    head = (buffers, to.grads, to.parameters, to.low, to.l1, to.l2)
    fields = (*head, *numbers, max_norm, to.stats, to.squares)
    if _call(_C.flush, buffers, fields, True) is None:
        _explain_flush(buffers, to)
        read = _named(to.parameters, "parameters") + _named(to.low or [], "compensation")
        for k, (buffer, grad) in enumerate(zip(buffers, to.grads, strict=True)):
            if grad is None or not same_elements(buffer, grad):
                read.append((f"buffers[{k}]", buffer))
        _explain_overlap(read, _named(to.grads, "grads"))
        _explain_rest(buffers, dict(zip(names, scale, strict=True)))
    _changed([grad for grad in to.grads if grad is not None])


def _explain_flush(buffers: Sequence[Any], to: FlushTo) -> None:
    several = zip(buffers, to.grads, to.parameters, strict=True)
    for k, (buffer, grad, parameter) in enumerate(several):
        explain_tensor(buffer, f"buffers[{k}]")
        if buffer.dtype not in _WIDENED:
            raise TypeError(
                f"mbkern: buffers[{k}] is {buffer.dtype}; it must be float32, float64 or bfloat16"
            )
        if to.low is not None:
            _explain_low(buffer, to.low[k], k, needed=False)
        for tensor, name in ((grad, "grads"), (parameter, "parameters")):
            if tensor is None:
                continue
            explain_tensor(tensor, f"{name}[{k}]")
            if tensor.shape != buffer.shape:
                raise ValueError(
                    f"mbkern: buffers[{k}] is {describe(buffer)}, and {name}[{k}] is "
                    f"{describe(tensor)}; they must have one shape"
                )
        if grad is None:
            continue
        if buffer.dtype == torch.float64 and grad.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"mbkern: buffers[{k}] is torch.float64 and grads[{k}] {grad.dtype}; a float64 "
                "buffer is flushed to float64 or float32"
            )
        explain_written(grad, f"grads[{k}]")


def _call(
    kernel: Callable[..., Any], first: list[Tensor], fields: tuple[Any, ...], sums: bool
) -> Any:
    head = first[0] if first else None
    if not isinstance(head, Tensor) or not on_cuda(head):
        return kernel((*fields, torch.get_num_threads(), None, 0))
    workspace = _new_workspace(first) if sums else None
    kernel = _cuda.on_device_of(head, kernel)
    return kernel((*fields, 1, workspace, _cuda.current_stream(head)))


def _new_workspace(tensors: Sequence[Tensor]) -> Tensor:
    blocks = sum(-(-t.numel() // _LIST_BLOCK) for t in tensors if isinstance(t, Tensor))
    size = _C.cuda_list_workspace_bytes(len(tensors), blocks) // 8
    return torch.empty(size, dtype=torch.float64, device=tensors[0].device)


def _changed(tensors: list[Tensor]) -> None:
    if _VERSIONS_OF_LISTS:
        torch.autograd.graph.increment_version(tensors)
        return
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _named(tensors: Sequence[Tensor | None], name: str) -> list[tuple[str, Tensor]]:
    return [(f"{name}[{k}]", t) for k, t in enumerate(tensors) if t is not None]


def _explain_lists(first: Sequence[Any], second: Sequence[Any], name: str) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"mbkern: there must be one of {name} for each buffer: {len(second)} and {len(first)}"
        )


def explain_tensor(tensor: Any, name: str) -> None:
    """Raise if a tensor is one that no kernel of a list takes."""
    if isinstance(tensor, Tensor) and tensor.is_complex():
        raise TypeError(
            f"mbkern: {name} is {tensor.dtype}; complex gradients are not supported: accumulate "
            "torch.view_as_real(...) of both"
        )
    if isinstance(tensor, Tensor) and tensor.layout is not torch.strided:
        raise TypeError(
            f"mbkern: {name} has layout {tensor.layout}; only strided tensors are supported: pass "
            "tensor.to_dense()"
        )
    if require_plain(tensor, name) is not tensor:
        raise ValueError(
            f"mbkern: {name} is a lazily negated view; pass tensor.resolve_neg(), a copy"
        )
    require_dtype(tensor, name)


def _explain_pair(buffer: Any, grad: Any, k: int) -> None:
    explain_tensor(buffer, f"buffers[{k}]")
    explain_tensor(grad, f"grads[{k}]")
    if buffer.shape != grad.shape:
        raise ValueError(
            f"mbkern: buffers[{k}] is {describe(buffer)}, and grads[{k}] is {describe(grad)}; "
            "they must have one shape"
        )
    if grad.dtype not in _WIDENED.get(buffer.dtype, ()):
        raise TypeError(
            f"mbkern: buffers[{k}] is {buffer.dtype} and grads[{k}] {grad.dtype}; a float32 buffer "
            "takes float32, bfloat16 and float16, a float64 buffer any of the four, a bfloat16 "
            "buffer with compensation= or seeds= what a float32 one takes; others are no buffers"
        )
    explain_written(buffer, f"buffers[{k}]")


def _explain_low(buffer: Tensor, low: Any, k: int, *, needed: bool) -> None:
    """Raise if what a buffer cannot hold does not fit the buffer, or is missing."""
    is_bf16 = buffer.dtype == torch.bfloat16
    if low is None:
        if is_bf16 and needed:
            raise TypeError(
                f"mbkern: buffers[{k}] is torch.bfloat16, whose 8 bits lose what is added to a "
                "larger sum: pass compensation= (a bfloat16 tensor for each buffer) or seeds=, or "
                "use float32 buffers"
            )
        return
    explain_tensor(low, f"compensation[{k}]")
    if not is_bf16 or low.dtype != torch.bfloat16 or low.shape != buffer.shape:
        raise ValueError(
            f"mbkern: buffers[{k}] is {describe(buffer)}, and compensation[{k}] {describe(low)}; "
            "compensation is for bfloat16 buffers, of their dtype and shape (None for others)"
        )
    explain_written(low, f"compensation[{k}]")


def explain_written(tensor: Tensor, name: str) -> None:
    """Raise if a tensor's elements cannot each be written."""
    if tensor.numel() and has_internal_overlap(tensor):
        raise ValueError(
            f"mbkern: elements of {name} share memory: {describe(tensor)}, strides "
            f"{tensor.stride()}; pass a tensor with an element of its own everywhere"
        )


def _explain_overlap(
    read: Sequence[tuple[str, Tensor]], written: Sequence[tuple[str, Tensor]]
) -> None:
    ranges = [(*byte_range(t), False, name) for name, t in read if t.numel()]
    ranges += [(*byte_range(t), True, name) for name, t in written if t.numel()]
    ranges.sort()
    furthest: dict[bool, tuple[int, str]] = {}
    for first, end, is_written, name in ranges:
        for other_written, (other_end, other) in furthest.items():
            if first < other_end and (is_written or other_written):
                raise ValueError(
                    f"mbkern: {other} and {name} share memory; what is written must not be read, "
                    "or written twice, in one call"
                )
        if is_written not in furthest or end > furthest[is_written][0]:
            furthest[is_written] = (end, name)


def _explain_rest(tensors: Sequence[Tensor], scalars: dict[str, object]) -> NoReturn:
    require_one_device(
        tensors[0], scalars, {f"tensor {k} of the list": t for k, t in enumerate(tensors)}
    )
    for k, tensor in enumerate(tensors):
        if tensor.dim() > _MAX_DIMS:
            raise ValueError(
                f"mbkern: tensor {k} of the list has {tensor.dim()} dimensions; at most "
                f"{_MAX_DIMS} are supported: pass views with fewer"
            )
    raise ValueError(
        "mbkern: these tensors are not supported together; a number that is a tensor on the GPU "
        "must not lie in memory that the call writes: " + ", ".join(map(describe, tensors[:8]))
    )
