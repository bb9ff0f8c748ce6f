"""The shortest way of a loss of two tensors: of one type and shape, no option but its numbers.

Where a kernel takes less time than what is around it, ``mbkern.autograd.TensorLoss`` spends more on
objects that hold what was asked for, and on questions that have one answer here, than the kernel
takes. Here ``_C.plain_loss`` asks what is to be asked and computes loss and gradients in one call,
before autograd's, and this Function is the node that hands them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbkern import _C
from mbkern._autograd_engine import graph_is_kept, saved_hooks
from mbkern._autograd_left import Left, Request, hand_out
from mbkern._launch import HUGE_PAGE_BYTES, SCALARS
from mbkern._launch_tensors import TensorOptions
from mbkern._losses import Loss
from mbkern._tensors import calls_are_watched
from mbkern.autograd import gradients_with_graph

_C.set_plain(
    watchers=(
        torch._C._are_functorch_transforms_active,
        torch._C._len_torch_dispatch_stack,
        torch._C._get_tracing_state,
    ),
    function_modes=torch._C._len_torch_function_stack,
    modes_watch=calls_are_watched,
    saved_hooks=saved_hooks,
    is_grad_enabled=torch.is_grad_enabled,
    threads=torch.get_num_threads,
    empty_like=torch.empty_like,
    scalars=(SCALARS[torch.float32], SCALARS[torch.float64]),
    most_bytes=HUGE_PAGE_BYTES - 1,
)


def plain_number(loss: Loss, reduction: str) -> int:
    """The number of a loss that ``_C.plain_loss`` computes, or -1.

    Not unreduced, where the gradient is formed in backward; not where values are looked at.
    """
    if reduction != "none" and loss.domain is None and loss.kind == "pointwise":
        return loss.number
    return -1


class PlainLoss(torch.autograd.Function):
    """``apply_plain(first, second, done, loss, reduction, parameters)``: the node of what
    ``_C.plain_loss`` has done."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        done: tuple[Tensor, tuple[Tensor | None, Tensor | None]],
        *asked: Any,
    ) -> Tensor:
        ctx.save_for_backward(first, second)  # for create_graph
        value, ctx.grads = done  # not the value: it holds this node
        ctx.asked = asked
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
        return (*grads, None, None, None, None)


def _request(ctx: Any) -> Request:
    loss, reduction, parameters = ctx.asked
    return Request(loss, TensorOptions(reduction=reduction, parameters=parameters))


# As of the Functions in mbkern.autograd.
PlainLoss._backward_cls.apply = PlainLoss.backward  # type: ignore[attr-defined]
apply_plain = super(torch.autograd.Function, PlainLoss).apply
