"""Buffers flushed into gradients: many tensors, one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbkern import _launch_lists
from mbkern._accumulate import Tensors, as_long, as_tensors, refuse_differentiated
from mbkern._arguments import Number
from mbkern._losses import as_number
from mbkern._tensors import refuse_tracing


class FlushStats(NamedTuple):
    """What :func:`flush_` measured; tensors on the buffers' device, which nobody waited for.

    Attributes:
        norm: 0-dim float64, the norm of all gradients together before clipping, with their
            penalties. The same bits for every number of threads, instruction set and device.
        clip_factor: 0-dim float64, what the gradients were multiplied by: 1, or
            ``max_norm / (norm + 1e-6)``.
        found_inf: 0-dim float32, 1 if the norm is not finite, or a gradient that was written in a
            type of a smaller range, else 0; as ``torch.amp.GradScaler`` has it. (A float64 square
            overflows above 1e154.)
        penalty: 0-dim float64, the sum of ``l1 |p| + l2 / 2 p^2`` over all parameters.
        squared_norms: (n,) float64, of each gradient before clipping.
    """

    norm: Tensor
    clip_factor: Tensor
    found_inf: Tensor
    penalty: Tensor
    squared_norms: Tensor


def flush_(
    grads: Tensors | None,
    buffers: Tensors,
    *,
    denominator: Number = 1.0,
    grad_scale: Number = 1.0,
    factor: Number = 1.0,
    parameters: Tensors | None = None,
    l1: float | Sequence[float] = 0.0,
    l2: float | Sequence[float] = 0.0,
    max_norm: float | None = None,
    compensation: Tensors | None = None,
) -> FlushStats:
    """Turn accumulated sums into the gradients that an optimizer takes.

    For each parameter p, with its buffer b::

        v = factor / (denominator * grad_scale) * b + l2 * p + l1 * sign(p)
        grad = clip_factor * v, rounded once to the gradient's dtype

    One pass without ``max_norm``; with it two, since the factor depends on all of v. Nobody waits
    for the device. A denominator of 0 (nothing was counted) makes the scale 0. Computed in the
    buffers' type, fp32 or fp64; norms in fp64, in one order on every chip.

    Args:
        grads: what is written: as many tensors as buffers, of the same shapes; float32, bfloat16,
            float16 or float64 for a float32 or bfloat16 buffer, float64 or float32 for a float64
            one. May be the buffers themselves. An entry that is None is measured only; None: all of
            them.
        buffers: un-normalised sums, float32, float64 or bfloat16.
        denominator: the number of items in the sums, or the sum of their weights; a number or a
            0-dim tensor of any dtype, read on its device.
        grad_scale: the loss scale of a ``GradScaler``, which is divided out; the same.
        factor: multiplies, like the number of ranks whose results will be averaged; the same.
        parameters: of the penalties; needed where ``l1`` or ``l2`` is not 0.
        l1: of all parameters, or one for each.
        l2: the same.
        max_norm: the largest norm that is not clipped, by ``torch.nn.utils.clip_grad_norm_``'s
            formula.
        compensation: of bfloat16 buffers, as :func:`accumulate_` had it: the sum is the two
            together. None for other buffers.

    On the CPU all of these may be NumPy arrays.

    Returns:
        A :class:`FlushStats`.

    Raises:
        TypeError: an unsuited dtype, a sparse or complex tensor, a subclass.
        ValueError: shapes that differ, memory that is shared, a penalty without its parameter,
            negative ``l1``, ``l2`` or ``max_norm``.
        RuntimeError: a tensor in ``grads`` requires grad, outside ``torch.no_grad()``.
        Nothing has been written then.
    """
    of = as_tensors(buffers, "buffers")
    none: list[Any] = [None] * len(of)
    to = as_long("grads", grads, of, written=True) or none
    penalised = as_long("parameters", parameters, of) or none
    low = as_long("compensation", compensation, of)
    refuse_tracing("flush_")
    if torch.is_grad_enabled():
        refuse_differentiated(to, "grads")
    of_l1, of_l2 = _penalty(l1, "l1", penalised), _penalty(l2, "l2", penalised)
    most = math.inf if max_norm is None else as_number(max_norm, "max_norm")
    if not most >= 0:
        raise ValueError(f"mbkern: max_norm is {max_norm}; it must be at least 0")
    device = of[0].device if of and isinstance(of[0], Tensor) else None
    stats = torch.zeros(4, dtype=torch.float64, device=device)
    stats[1].fill_(1)  # where there is nothing to clip
    squares = torch.empty(len(of), dtype=torch.float64, device=device)
    if of:
        target = _launch_lists.FlushTo(to, penalised, low, of_l1, of_l2, stats, squares)
        scale = (factor, denominator, grad_scale)
        _launch_lists.flush(of, target, scale, most)
    norm, clip_factor, found_inf, penalty = stats.unbind()
    found = found_inf.float()
    # What is finite may not be so in a type with a smaller range: fp16, or fp32 of fp64.
    narrower = [
        grad
        for grad, buffer in zip(to, of, strict=True)
        if grad is not None
        and grad.numel()
        and torch.finfo(grad.dtype).max < torch.finfo(buffer.dtype).max / 2
    ]
    for grad in narrower:
        found = torch.maximum(found, (~grad.isfinite()).any().float())
    return FlushStats(norm, clip_factor, found, penalty, squares)


def _penalty(value: Any, name: str, parameters: list[Any]) -> float | list[float]:
    several = not isinstance(value, (str, bytes)) and (
        isinstance(value, Sequence) or (hasattr(value, "ndim") and value.ndim > 0)
    )
    numbers = [as_number(x, name) for x in (value if several else [value])]
    if several and len(numbers) != len(parameters):
        raise ValueError(
            f"mbkern: {name} must be a number or one for each buffer: {len(numbers)} and "
            f"{len(parameters)}"
        )
    for k, number in enumerate(numbers):
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(f"mbkern: {name} is {number}; it must be finite and at least 0")
        where = range(len(parameters)) if not several else [k]
        missing = [p for p in where if number and parameters[p] is None]
        if missing:
            raise ValueError(
                f"mbkern: {name} is {number}, but parameters[{missing[0]}] is missing: a penalty's "
                "gradient needs the parameter"
            )
    return numbers if several else numbers[0]
