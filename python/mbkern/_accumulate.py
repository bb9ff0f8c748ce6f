"""Gradients added into buffers: many tensors, one call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from mbkern import _launch_lists
from mbkern._arguments import Number, tensor_of_array
from mbkern._tensors import refuse_tracing

#: One tensor or several; on the CPU also NumPy arrays.
Tensors = Tensor | Sequence[Any] | Any


class Measured(NamedTuple):
    """What :func:`accumulate_` measured of the gradients, in the same read.

    Attributes:
        squared_norms: (n,) float64, the sum of the squares of each gradient, before ``alpha``. The
            same bits for every number of threads, instruction set and device.
        finite: (n,) bool, whether that sum is finite: a float32 or 16-bit gradient has no NaN or
            infinity. (In float64 a square may also overflow, above 1e154.)
    """

    squared_norms: Tensor
    finite: Tensor


_PLAIN = {Tensor, torch.nn.Parameter}


def as_tensors(given: Any, name: str, *, written: bool = False) -> list[Any]:
    """Return a tensor, an array or a sequence of them as a list; NumPy arrays share their memory.

    What is no tensor stays, for the launch to refuse.
    """
    if type(given) is list:
        own = list(given)  # another thread may change the caller's while the kernel runs
        if _PLAIN.issuperset(map(type, own)):
            return own
    if isinstance(given, Tensor) or hasattr(given, "__array_interface__"):
        given = (given,)
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        raise TypeError(
            f"mbkern: {name} must be a tensor, a NumPy array or a sequence of them, not "
            f"{type(given).__name__}"
        )
    return [_as_tensor(item, f"{name}[{k}]", written) for k, item in enumerate(given)]


def _as_tensor(item: Any, name: str, written: bool) -> Any:
    if isinstance(item, Tensor) or not hasattr(item, "__array_interface__"):
        return item
    array = np.asanyarray(item)  # whatever has the interface
    if written and (isinstance(item, np.generic) or not array.flags.writeable):
        raise ValueError(f"mbkern: {name} is a read-only array or a number")
    return tensor_of_array(array, name)


@overload
def accumulate_(
    buffers: Tensors,
    grads: Tensors,
    alpha: Number = ...,
    beta: Number = ...,
    *,
    measure: Literal[False] = ...,
    compensation: Tensors | None = ...,
    seeds: int | Sequence[int] | None = ...,
) -> None: ...
@overload
def accumulate_(
    buffers: Tensors,
    grads: Tensors,
    alpha: Number = ...,
    beta: Number = ...,
    *,
    measure: Literal[True],
    compensation: Tensors | None = ...,
    seeds: int | Sequence[int] | None = ...,
) -> Measured: ...


def accumulate_(
    buffers: Tensors,
    grads: Tensors,
    alpha: Number = 1.0,
    beta: Number = 1.0,
    *,
    measure: bool = False,
    compensation: Tensors | None = None,
    seeds: int | Sequence[int] | None = None,
) -> Measured | None:
    """Add gradients into buffers, in place: ``buffer = beta * buffer + alpha * grad`` for each.

    One pass over all tensors, by all threads or in one launch on CUDA, and without a copy: 16-bit
    gradients are widened exactly as they are read. Computed in the buffer's type as
    ``fma(alpha, grad, beta * buffer)`` (float64: two roundings), so with both factors 1 it is one
    correctly rounded addition. The same bits for every number of threads, instruction set and
    device, however the tensors are batched into calls.

    A bfloat16 buffer has 8 bits: of what is added to a sum 512 times as large nothing would be
    left. So its sum is a pair of bfloat16, 16 bits in all (``compensation``), or it is rounded up
    or down by chance, as often as it should be (``seeds``): right on average, with an error that
    grows like the root of the number of additions. Either is computed in fp32.

    Args:
        buffers: tensors of any shape and layout, float32 or float64; written. bfloat16 with
            ``compensation`` or ``seeds``. Nothing else may lie in their memory, and they do not
            become part of an autograd graph.
        grads: as many tensors of the same shapes: float32, bfloat16 or float16 for a float32 or
            bfloat16 buffer, float64 or any of those for a float64 buffer. Read as numbers.
        alpha: a number or a 0-dim tensor, which is read on its device.
        beta: the same. With 0 the buffers are not read, so they need not be initialised.
        measure: also return the gradients' squared norms, measured in the same read.
        compensation: for each bfloat16 buffer a bfloat16 tensor of its shape, the part of the sum
            that the buffer cannot hold (Kahan's compensation), written; None for other buffers. Not
            read where ``beta`` is 0. Give it to :func:`flush_` too.
        seeds: for bfloat16 buffers without compensation: integers in [0, 2^53), one for each buffer
            or one for all. The same seed rounds the same way: give each call another. Elements are
            counted in the order of the buffer's memory.

    Both lists may be a single tensor. On the CPU they may be NumPy arrays.

    Returns:
        None, or a :class:`Measured` with ``measure=True``.

    Raises:
        TypeError: an unsuited dtype, a sparse or complex tensor, a subclass.
        ValueError: shapes that differ, memory that is shared, tensors on several devices, a seed
            out of range.
        RuntimeError: a buffer requires grad, outside ``torch.no_grad()``.
        Nothing has been written then.
    """
    # Lists go to the kernel as they are; it takes tensors only, and looks at each in any case.
    to = list(buffers) if type(buffers) is list else as_tensors(buffers, "buffers", written=True)
    of = list(grads) if type(grads) is list else as_tensors(grads, "grads")
    refuse_tracing("accumulate_")
    low = as_long("compensation", compensation, to, written=True)
    keys = None if seeds is None else _as_keys(seeds, len(to))
    if torch.is_grad_enabled():
        refuse_differentiated(to, "buffers")
        refuse_differentiated(low or [], "compensation")
    squares = None
    if measure:
        device = to[0].device if to and isinstance(to[0], Tensor) else torch.device("cpu")
        squares = torch.empty(len(to), dtype=torch.float64, device=device)
    if not _launch_lists.accumulate(to, of, alpha, beta, squares, low, keys):
        to, of = as_tensors(to, "buffers", written=True), as_tensors(of, "grads")
        if not _launch_lists.accumulate(to, of, alpha, beta, squares, low, keys):
            _launch_lists.explain_accumulate(to, of, alpha, beta, low, keys)
    return None if squares is None else Measured(squares, squares.isfinite())


def as_long(name: str, given: Any, of: list[Any], *, written: bool = False) -> list[Any] | None:
    """As many tensors, or None in their place, as there are buffers; None for None."""
    if given is None:
        return None
    tensors = as_tensors(given, name, written=written)
    if len(tensors) != len(of):
        raise ValueError(
            f"mbkern: there must be one of {name} for each buffer: {len(tensors)} and {len(of)}"
        )
    return tensors


def _as_keys(seeds: int | Sequence[int], count: int) -> list[int]:
    given: Any = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    try:
        keys = [operator.index(k) for k in (given if several else [given])]
    except TypeError as error:
        raise TypeError(f"mbkern: seeds must be integers: {error}") from None
    keys = keys if several else keys * count
    if len(keys) != count:
        raise ValueError(
            f"mbkern: there must be one of seeds for each buffer: {len(keys)} and {count}"
        )
    for key in keys:
        if not 0 <= key < 1 << 53:
            raise ValueError(f"mbkern: a seed is {key}; it must be in [0, 2^53)")
    return keys


def refuse_differentiated(tensors: list[Any], name: str) -> None:
    """Raise, as torch's own in-place operations do, if a tensor that is written requires grad."""
    for k, tensor in enumerate(tensors):
        if getattr(tensor, "requires_grad", False):
            raise RuntimeError(
                f"mbkern: {name}[{k}] requires grad and is written in place; do so under "
                "torch.no_grad(), or pass tensor.detach()"
            )
