"""What the forward of a loss leaves to its backward, and how its gradients are handed out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mbkern import _C
from mbkern._arguments import Number, compute_dtype
from mbkern._autograd_engine import SECOND_BACKWARD, graph_is_kept, is_legacy_batched
from mbkern._launch import hint_argument, rescale_on_device, scale_dense
from mbkern._losses import Loss
from mbkern._tensors import on_cuda

_OVERWRITTEN = (
    "mbkern: with inplace=True the gradient is over the input, and it has been modified by an "
    "inplace operation since; the input is gone after the loss, and must not be written to"
)


@dataclass(slots=True)
class Request:
    """What a Function is asked for, besides its tensors.

    Attributes:
        loss: which loss.
        options: its options: RowOptions or TensorOptions.
        grad_scale: a hint of the incoming gradient: a number, a 0-dim tensor or None.
        inplace: write the gradient over the input.
        loss_dtype: the dtype of the result; None for the input's.
    """

    loss: Loss
    options: Any
    grad_scale: Number | None = None
    inplace: bool = False
    loss_dtype: torch.dtype | None = None


@dataclass(slots=True)
class Left:
    """What forward leaves to backward, besides the tensors that autograd saves.

    Attributes:
        divisor: of the mean.
        grads: formed in forward, as backward returns them; empty when handed out; None: backward
            forms them.
        hint: what they were multiplied by.
        guessed: whether they are right for an incoming gradient of 1 only.
        state: what backward needs of each item (RowCall.new_state). Among the saved tensors only
            with ``hooked``: a checkpoint counts them, and they must not depend on the guess.
        version: of the input, after its gradient was written over it.
        hooked: whether hooks took the saved tensors away.
        deferred: whether it is only for them that backward forms the gradients.
    """

    request: Request
    divisor: float | Tensor
    grads: tuple[Tensor | None, ...] | None = None
    hint: float | Tensor = 1.0
    version: int = -1
    guessed: bool = False
    state: Tensor | None = None
    hooked: bool = False
    deferred: bool = False


class Incoming:
    """Whether the last incoming gradient of a 16-bit one was 1: a guess for the next; the results
    are the same bits either way."""

    was_one: ClassVar[bool] = True

    @classmethod
    def will_be_one(cls, input: Tensor, inplace: bool) -> bool:
        """The guess. No on CUDA, where nobody looks, and where there is no second try."""
        return cls.was_one and not inplace and not on_cuda(input)

    @classmethod
    def is_one(cls, incoming: Tensor) -> bool:
        """Whether it is, to be remembered."""
        value = _C.scalar_value(incoming)
        if value is not None:
            cls.was_one = value == 1.0
        return value == 1.0


def forget_guess(left: Left) -> None:
    """Free gradients that were formed for nothing."""
    if left.guessed:
        left.grads = None


def formed_for(left: Left, incoming: Tensor) -> tuple[Tensor | None, ...] | None:
    """The gradients that forward formed, if they are those of this incoming gradient."""
    grads = left.grads
    if grads is None or not left.guessed or Incoming.is_one(incoming):
        return grads
    forget_guess(left)
    return None


def left_under_hooks(request: Request, divisor: float | Tensor, deferred: bool) -> Left:
    hint = request.grad_scale if deferred else None
    # Read now: GradScaler changes its scale in place.
    factor = 1.0 if hint is None else hint_argument(hint)
    return Left(request, divisor, hint=factor, hooked=True, deferred=deferred)


def hand_out(
    left: Left,
    grads: tuple[Tensor | None, ...],
    incoming: Tensor,
    *,
    keep_zeros: bool,
    fresh: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients, formed with the hint, times what the incoming gradient is more.

    Our references are dropped first: AccumulateGrad keeps a gradient that nobody else holds, and
    clones any other. ``fresh``: there are none, backward has just formed them.
    """
    hint, inplace = left.hint, left.request.inplace
    if not grads:
        raise RuntimeError(SECOND_BACKWARD)
    if inplace and not fresh and grads[0] is not None and grads[0]._version != left.version:
        raise RuntimeError(_OVERWRITTEN)
    value = _C.scalar_value(incoming)
    if value is None:  # no plain number on the host
        if is_legacy_batched(incoming):  # is_grads_batched: many incoming gradients at once
            factors = incoming.double() / hint
            return tuple(None if g is None else _each(g, factors, keep_zeros) for g in grads)
        if not on_cuda(incoming):
            value = incoming.item()
    if fresh:
        pass
    elif graph_is_kept():
        grads = tuple(None if g is None else g.clone() for g in grads)
    else:
        left.grads = ()
    if value is None:
        return tuple(
            None if g is None else rescale_on_device(g, incoming, hint, keep_zeros=keep_zeros)
            for g in grads
        )
    factor = value / float(hint)
    if factor == 1.0:
        return grads
    dense = not inplace
    return tuple(None if g is None else _scaled(g, factor, dense, keep_zeros) for g in grads)


def _scaled(grad: Tensor, factor: float, dense: bool, keep_zeros: bool) -> Tensor:
    if dense:
        return scale_dense(grad, factor, keep_zeros=keep_zeros)
    if keep_zeros and not math.isfinite(factor):
        return grad.masked_scatter_(grad != 0, grad[grad != 0] * factor)
    return grad.mul_(factor)


def _each(grad: Tensor, factors: Tensor, keep_zeros: bool) -> Tensor:
    compute = compute_dtype(grad.dtype)
    many = (grad.to(compute) * factors.to(compute)).to(grad.dtype)
    return torch.where(grad == 0, grad, many) if keep_zeros else many
