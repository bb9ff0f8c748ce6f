"""The shortest way of a loss of two tensors: of one type and shape, no option but its numbers.

Where a kernel takes less time than what is around it, ``mbkern.autograd.TensorLoss`` spends more on
objects that hold what was asked for, and on questions that have one answer here, than the kernel
takes. This is that Function without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbkern import _C
from mbkern._arguments import REDUCTIONS
from mbkern._autograd_engine import graph_is_kept, saved_hooks
from mbkern._autograd_left import Left, Request, hand_out
from mbkern._calls import new_call
from mbkern._launch import new_gradient, new_scalar
from mbkern._launch_tensors import TensorOptions
from mbkern._losses import Loss
from mbkern.autograd import gradients_with_graph


def is_plain(loss: Loss, reduction: str) -> bool:
    """Whether :func:`plain_loss` takes tensors whose ``_C.plainness`` is 2.

    Those have no 16 bits, where a gradient is formed in forward on a guess only. Not unreduced, or
    under hooks of saved tensors, where it is formed in backward; not where values are looked at.
    """
    return (
        reduction != "none"
        and loss.domain is None
        and loss.kind == "pointwise"
        and saved_hooks(False) is None
    )


def plain_loss(
    loss: Loss, first: Tensor, second: Tensor, reduction: str, parameters: tuple[float, ...]
) -> Tensor:
    """Compute the loss of tensors of which :func:`is_plain` holds."""
    if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
        result: Tensor = _apply(first, second, loss, reduction, parameters)  # type: ignore[no-untyped-call]
        return result
    return _launch(loss, first, second, reduction, parameters, None, None)


def _launch(
    loss: Loss,
    first: Tensor,
    second: Tensor,
    reduction: str,
    parameters: tuple[float, ...],
    grad_first: Tensor | None,
    grad_second: Tensor | None,
) -> Tensor:
    value = new_scalar(first.dtype)
    done = _C.pointwise_loss((
        loss.number, first, second, None, None, None, None, None, grad_first, grad_second, None,
        False, parameters, 1.0, REDUCTIONS[reduction], None, value, None, torch.get_num_threads(),
        None, 0,
    ))  # fmt: skip
    if done is None:  # a negated view, or dimensions that do not merge
        call = new_call(loss, (first, second, None), _options(reduction, parameters))
        value, _ = call.run(grads=(grad_first, grad_second, None), loss_dtype=first.dtype)
    assert value is not None
    return value


def _options(reduction: str, parameters: tuple[float, ...]) -> TensorOptions:
    return TensorOptions(reduction=reduction, parameters=parameters)


class PlainLoss(torch.autograd.Function):
    """``TensorLoss`` where :func:`is_plain` holds; the loss and its options are arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        loss: Loss,
        reduction: str,
        parameters: tuple[float, ...],
    ) -> Tensor:
        needs = ctx.needs_input_grad
        grad_first = new_gradient(first) if needs[0] else None
        grad_second = new_gradient(second) if needs[1] else None
        value = _launch(loss, first, second, reduction, parameters, grad_first, grad_second)
        ctx.save_for_backward(first, second)  # for create_graph
        ctx.asked, ctx.grads = (loss, reduction, parameters), (grad_first, grad_second)
        return value

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            first, second = ctx.saved_tensors
            grads = gradients_with_graph(_request(ctx), 1.0, incoming, first, second, None)[:2]
        elif ctx.grads and _C.scalar_value(incoming) == 1.0 and not graph_is_kept():
            # Our references go: AccumulateGrad keeps a gradient that nobody else holds.
            grads, ctx.grads = ctx.grads, ()
        else:
            left = Left(_request(ctx), 1.0, ctx.grads)
            grads = hand_out(left, ctx.grads, incoming, keep_zeros=False)
            ctx.grads = left.grads
        return (*grads, None, None, None)


def _request(ctx: Any) -> Request:
    loss, reduction, parameters = ctx.asked
    return Request(loss, _options(reduction, parameters))


# As of the Functions in mbkern.autograd.
PlainLoss._backward_cls.apply = PlainLoss.backward  # type: ignore[attr-defined]
_apply = super(torch.autograd.Function, PlainLoss).apply
