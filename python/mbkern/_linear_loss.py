"""The fused head as an autograd Function: linear, then cross-entropy, without the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mbkern import _C, _composite
from mbkern._arguments import Number, compute_dtype
from mbkern._autograd_engine import (
    MARK,
    SECOND_BACKWARD,
    graph_is_kept,
    is_legacy_batched,
    saved_hooks,
)
from mbkern._launch import hint_argument, new_zeros, scalar_argument
from mbkern._linear_buffers import Accumulation, Destination, gradient_dtype
from mbkern._linear_call import Gradients, LinearCall
from mbkern._linear_rows import LinearOptions
from mbkern._linear_stats import Collector
from mbkern._losses import find

__all__ = ["LinearLoss", "LinearRequest", "unfused"]


@dataclass(slots=True)
class LinearRequest:
    """What the Function is asked for, besides its tensors.

    Attributes:
        options: the head's options.
        dtype: what the products are computed in.
        loss_dtype: the dtype of the result.
        grad_scale: a hint of the incoming gradient: a number, a 0-dim tensor or None.
        accumulate_into: where the weight's gradient is added; None: into what backward returns.
        stats: sees the logits in forward.
    """

    options: LinearOptions
    dtype: torch.dtype
    loss_dtype: torch.dtype
    grad_scale: Number | None = None
    accumulate_into: Destination | None = None
    stats: Collector | None = None
    lse: Tensor | None = None  # set in forward, with ``stats``: (rows, inner) of all items
    kept: Tensor | None = None


def unfused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    target: Tensor,
    options: LinearOptions,
    dtype: torch.dtype,
    loss_of_logits: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The same by torch's operations, all logits at once: for what takes derivatives of it.

    ``dtype``: what the product is computed in, whatever autocast says when derivatives are taken.
    """
    input, weight = input.to(dtype), weight.to(dtype)
    batch, inner = input.shape[:-1], weight.shape[1:-1]
    if options.shift:
        along = len(batch) - 1
        length = batch[-1] - options.shift
        if target.shape[: len(batch)] == batch:
            target = target.narrow(along, options.shift, length)
        input = input.narrow(along, 0, length)
        batch = input.shape[:-1]
    flat_bias = None if bias is None else bias.reshape(-1).to(dtype)
    z = torch.nn.functional.linear(input, weight.reshape(-1, weight.shape[-1]), flat_bias)
    z = z.reshape(-1, weight.shape[0], *inner)
    if options.logit_scale is not None:
        z = z * options.logit_scale
    if scale is not None:
        z = z * scale
    has_index = target.shape == (*batch, *inner)
    columns = () if has_index else (weight.shape[0],)
    loss = loss_of_logits(z, target.reshape(-1, *columns, *inner))
    return loss.reshape((*batch, *inner)) if loss.dim() else loss


def _formula(
    request: LinearRequest, divisor: float | Tensor, tensors: tuple[Any, Any, Any, Any, Any]
) -> Tensor:
    rows = request.options.row
    if rows.reduction == "mean":  # as it was in forward
        rows = replace(rows, denominator=divisor)
    loss = find("cross_entropy")

    def of_logits(z: Tensor, target: Tensor) -> Tensor:
        flat = rows
        if rows.sample_weight is not None:
            shape = (*tensors[0].shape[:-1], *tensors[1].shape[1:-1])
            if request.options.shift:
                cut = len(tensors[0].shape) - 2
                shape = (*shape[:cut], shape[cut] - request.options.shift, *shape[cut + 1 :])
            weights = rows.sample_weight.expand(shape).reshape(-1, *tensors[1].shape[1:-1])
            flat = replace(rows, sample_weight=weights)
        return _composite.row_loss(loss, z, target, flat, request.loss_dtype)

    return unfused(*tensors, request.options, request.dtype, of_logits)


def _by_formula(
    request: LinearRequest, divisor: float | Tensor, incoming: Tensor,
    tensors: tuple[Any, Any, Any, Any, Any], create_graph: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the formula: for create_graph, or many incoming gradients at once."""
    # Under autocast the product would not have the dtype that it had in forward.
    with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):

        def value(*parts: Any) -> Tensor:
            return _formula(request, divisor, parts)

        return _composite.gradients(value, tensors, incoming, create_graph)


class LinearLoss(torch.autograd.Function):
    """``LinearLoss.apply(input, weight, bias, scale, target, request)``; see LinearRequest.

    Three ways. Where results have full precision, or ``grad_scale`` says by what they will be
    multiplied, the gradients are formed in forward, chunk by chunk: three products. Otherwise, and
    where the weight's gradient goes into a buffer, nothing but two numbers an item is kept in
    forward, and backward computes the logits again: four products. Under hooks of saved tensors
    (checkpoints, offloading), which would not free gradients, what forward would have formed is
    formed in backward: four products, the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        target: Tensor,
        request: LinearRequest,
    ) -> Tensor:
        options = request.options
        call = LinearCall(input, weight, bias, target, scale, options, request.dtype)
        divisor = ctx.divisor = call.divisor()
        needs = ctx.needs_input_grad[:4]
        hint = request.grad_scale
        full = hint is not None or compute_dtype(request.dtype) is request.dtype
        stats = request.stats
        hooked = saved_hooks(False) is not None
        early = options.row.reduction != "none" and request.accumulate_into is None and full
        ctx.deferred = early and hooked
        state = ctx.formed = None
        if early:
            # Read now: GradScaler changes its scale in place.
            ctx.hint = 1.0 if hint is None else hint_argument(hint)
        if early and not hooked:
            into = new_gradients(call, needs)
            loss = call.run(
                into, divisor=divisor, scale=ctx.hint, loss_dtype=request.loss_dtype, stats=stats
            )
            ctx.formed = (into.input, into.weight, into.bias, into.scale)
        else:
            state = call.new_state()
            loss = call.run(
                Gradients(), divisor=divisor, state=state, loss_dtype=request.loss_dtype,
                stats=stats,
            )  # fmt: skip
        tensors = (input, weight, bias, scale, target)
        _save(ctx, tensors, None if early else state, request)
        if stats is not None:
            request.lse, request.kept = call.lse_of(stats), call.kept
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        tensors, state, request = _saved(ctx)
        batched = is_legacy_batched(incoming)
        if torch.is_grad_enabled() or batched:
            if request.accumulate_into is not None:
                raise RuntimeError(
                    "mbkern: linear_cross_entropy with accumulate_into gives no gradient that can "
                    "itself be differentiated (create_graph=True), or taken for many incoming "
                    "gradients at once"
                )
            create = torch.is_grad_enabled()
            return (*_by_formula(request, ctx.divisor, incoming, tensors, create), None)
        if ctx.deferred:
            return _scaled(_form_whole(ctx, tensors, request), ctx.hint, incoming, tensors)
        if ctx.formed is not None:
            return _hand_out(ctx, incoming, tensors)
        return _form(ctx, incoming, tensors, state, request)


def _save(
    ctx: Any, tensors: tuple[Tensor | None, ...], state: Tensor | None, request: LinearRequest
) -> None:
    rows = request.options.row
    mark = None if saved_hooks(False) is None else MARK
    ctx.save_for_backward(mark, *tensors, rows.weight, rows.sample_weight, state)
    ctx.request = replace(request, stats=None)
    # The tensor that carries .grad or main_grad: what is unpacked may be another one.
    ctx.weight = None if request.accumulate_into is None else tensors[1]


def _saved(ctx: Any) -> tuple[tuple[Any, Any, Any, Any, Any], Any, LinearRequest]:
    """What was saved; read once, since a checkpoint computes it again each time."""
    _, *tensors, of_class, of_item, state = ctx.saved_tensors
    request: LinearRequest = ctx.request
    rows = replace(request.options.row, weight=of_class, sample_weight=of_item)
    request = replace(request, options=replace(request.options, row=rows))
    return tuple(tensors), state, request


def _weight_is_wanted(ctx: Any) -> bool:
    """Whether this backward goes on to the weight: with ``inputs=`` it need not."""
    if not ctx.needs_input_grad[1]:
        return False
    try:
        wanted: bool = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
        return wanted
    except RuntimeError:  # the weight is an input of torch.autograd.grad
        if ctx.weight is None:
            return True
        raise RuntimeError(
            "mbkern: torch.autograd.grad asks for the gradient of a linear_weight that goes into "
            "accumulate_into; leave it out, or call without accumulate_into"
        ) from None


def new_gradients(call: LinearCall, needs: tuple[bool, ...]) -> Gradients:
    """Memory for the gradients that are needed."""
    device, wide = call.x.device, call.compute
    return Gradients(
        call.new_input_gradient() if needs[0] else None,
        new_zeros(call.w.shape, wide, device) if needs[1] else None,
        torch.zeros(call.w.shape[0], dtype=wide, device=device) if needs[2] else None,
        torch.zeros((), dtype=torch.float64, device=device) if needs[3] else None,
    )


def as_argument(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient as autograd takes it, in the shape and the dtype of its argument."""
    if gradient is None or like is None:
        return None
    shaped = gradient if gradient.shape == like.shape else gradient.view(like.shape)
    return shaped.to(gradient_dtype(like))


def _hand_out(ctx: Any, incoming: Tensor, tensors: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The gradients formed in forward, times what the incoming gradient is more than the hint."""
    grads = list(ctx.formed)
    if not grads:
        raise RuntimeError(SECOND_BACKWARD)
    if graph_is_kept():
        grads = [None if g is None else g.clone() for g in grads]
    else:
        ctx.formed = ()
    return _scaled(grads, ctx.hint, incoming, tensors)


def _scaled(
    grads: list[Tensor | None], hint: Any, incoming: Tensor, tensors: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients formed with the hint, times what the incoming gradient is more."""
    value = _C.scalar_value(incoming)
    factor = (incoming.double() if value is None else value) / hint
    if isinstance(factor, Tensor) or factor != 1.0:
        for g in grads:
            if g is not None:
                _rescale(g, factor)
    out = [as_argument(g, t) for g, t in zip(grads, tensors, strict=False)]
    del grads
    return (*out, None, None)


def _rescale(grad: Tensor, factor: float | Tensor) -> None:
    """Multiply in place; 0 stays 0, the gradient of an ignored row."""
    if isinstance(factor, Tensor):
        grad.copy_(torch.where(grad == 0, grad, (grad * factor).to(grad.dtype)))
    elif math.isfinite(factor):
        grad.mul_(factor)
    else:
        grad.masked_scatter_(grad != 0, grad[grad != 0] * factor)


def _form_whole(ctx: Any, tensors: tuple[Any, ...], request: LinearRequest) -> list[Tensor | None]:
    """What forward would have formed, but for hooks."""
    input, weight, bias, scale, target = tensors
    call = LinearCall(input, weight, bias, target, scale, request.options, request.dtype)
    into = new_gradients(call, ctx.needs_input_grad[:4])
    call.run(into, divisor=ctx.divisor, scale=ctx.hint, loss_dtype=request.loss_dtype)
    return [into.input, into.weight, into.bias, into.scale]


def _form(
    ctx: Any, incoming: Tensor, tensors: tuple[Any, ...], state: Tensor, request: LinearRequest
) -> tuple[Tensor | None, ...]:
    """Backward from the logits, computed again, and the saved state of each item."""
    input, weight, bias, scale, target = tensors
    call = LinearCall(input, weight, bias, target, scale, request.options, request.dtype)
    into, sums = _destinations(ctx, call, tensors, request)
    if request.options.row.reduction == "none":
        items = call.of_kept(incoming)
        call.run(into, divisor=1.0, item_scale=items, state=state, from_state=True)
    else:
        factor = scalar_argument(incoming, "the incoming gradient")
        call.run(into, divisor=ctx.divisor, scale=factor, state=state, from_state=True)
    into.weight = None
    grad_weight = sums.finish() if sums is not None else None
    return (
        as_argument(into.input, input), grad_weight, as_argument(into.bias, bias),
        as_argument(into.scale, scale), None, None,
    )  # fmt: skip


def _destinations(
    ctx: Any, call: LinearCall, tensors: tuple[Any, ...], request: LinearRequest
) -> tuple[Gradients, Accumulation | None]:
    """Memory for the gradients that are needed, the weight's where it was asked for."""
    needs = ctx.needs_input_grad[:4]
    into = new_gradients(call, (needs[0], False, needs[2], needs[3]))
    if not _weight_is_wanted(ctx):
        return into, None
    weight = tensors[1] if ctx.weight is None else ctx.weight
    rows = request.options.row
    others = (*tensors[:1], *tensors[2:], rows.weight, rows.sample_weight)
    sums = Accumulation(request.accumulate_into, weight, call.compute, others)
    into.weight = sums.memory
    return into, sums


class LogSumExp(torch.autograd.Function):
    """``LogSumExp.apply(input, weight, bias, scale, target, lse, request)``: ``lse`` of a call that
    has been made, (rows, inner), with its derivative: backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        target: Tensor,
        lse: Tensor,
        request: LinearRequest,
    ) -> Tensor:
        _save(ctx, (input, weight, bias, scale, target), None, request)
        return lse.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_legacy_batched(incoming):
            raise RuntimeError(
                "mbkern: the lse of return_stats gives no gradient that can itself be "
                "differentiated (create_graph=True); use torch.logsumexp of the logits"
            )
        tensors, _, request = _saved(ctx)
        input, weight, bias, scale, target = tensors
        call = LinearCall(input, weight, bias, target, scale, request.options, request.dtype)
        into, sums = _destinations(ctx, call, tensors, request)
        call.run_log_sum_exp(into, incoming)
        into.weight = None
        grad_weight = None if sums is None else sums.finish()
        return (
            as_argument(into.input, input), grad_weight, as_argument(into.bias, bias),
            as_argument(into.scale, scale), None, None, None,
        )  # fmt: skip
