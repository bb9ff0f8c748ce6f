"""The autograd Functions behind ``mbkern.functional``: a loss is an argument, not a class.

The gradient is formed in forward, in the same pass as the loss, where its factor is known well
enough (fp32 and fp64, or a ``grad_scale`` hint), and multiplied by what the incoming gradient is
more. A 16-bit gradient takes no second factor, since it is to be rounded once: it is formed in
forward on the guess that the incoming gradient will be 1, as it was the last time, and formed anew
in backward if it is not. For ``reduction="none"``, where nothing is guessed, and under hooks of
saved tensors (checkpoints, offloading), which free what is saved and would not free a gradient, it
is formed in backward from the logits and two saved numbers an item; the bits are the same.

``mbkern.functional`` checks its arguments and comes here; who calls a Function checks them before,
and has plain tensors, outside torch.compile and torch.func::

    loss, = (l for l in mbkern.losses() if l.name == "cross_entropy")
    request = Request(loss, RowOptions(reduction="sum", z_loss=1e-4))
    value = RowLoss.apply(logits, target, request)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mbkern import _composite, _ops
from mbkern._arguments import check_output
from mbkern._autograd_engine import (
    MARK,
    graph_is_kept,
    is_legacy_batched,
    is_ours_alone,
    saved_hooks,
)
from mbkern._autograd_left import (
    Incoming,
    Left,
    Request,
    forget_guess,
    formed_for,
    hand_out,
    left_under_hooks,
)
from mbkern._calls import new_call
from mbkern._launch import (
    RowCall,
    RowOptions,
    bump_version,
    hint_argument,
    new_gradient,
    scalar_argument,
)
from mbkern._launch_tensors import Grads, Inputs, TensorOptions
from mbkern._losses import Loss

__all__ = ["Request", "RowLoss", "RowOptions", "TensorLoss", "TensorOptions"]

_creation = getattr(torch._C._autograd, "_get_creation_meta", lambda _: None)
_DOUBLE_BACKWARD = (
    "mbkern: {name} was asked for a gradient that can itself be differentiated "
    "(create_graph=True), which it does not support, or not with inplace=True, which overwrites "
    "the logits; use torch.nn.functional for second derivatives"
)


def _differentiable(
    formula: Callable[..., Tensor],
    request: Request,
    divisor: float | Tensor,
    incoming: Tensor,
    *tensors: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the formula as a graph: for create_graph, to be differentiated again.

    Asked for by torch.is_grad_enabled() in backward, not by once_differentiable: that asks whether
    the incoming gradient requires grad, and that of a root loss does not.
    """
    if request.inplace or not _composite.is_available(request.loss):
        raise RuntimeError(_DOUBLE_BACKWARD.format(name=request.loss.name))
    assert tensors[0] is not None
    dtype = request.loss_dtype or tensors[0].dtype
    options = request.options
    if isinstance(options.denominator, Tensor):  # as it was in forward
        options = replace(options, denominator=divisor)

    def value(*parts: Tensor | None) -> Tensor:
        return formula(request.loss, *parts, options, dtype)

    return _composite.gradients(value, tensors, incoming, create_graph=True)


def _new_version(written: Tensor) -> int:
    bump_version(written)
    return written._version


def _check_inplace(input: Tensor, others: tuple[Tensor | None, ...]) -> None:
    base = input._base
    if (input.is_leaf and input.requires_grad) or (
        base is not None and base.is_leaf and base.requires_grad
    ):
        raise RuntimeError(
            "mbkern: inplace=True would overwrite a leaf that requires grad, or a view of one; "
            "pass the result of a computation, or a copy"
        )
    kind = "DEFAULT" if base is None else getattr(_creation(input), "name", "DEFAULT")
    if kind != "DEFAULT":
        raise RuntimeError(
            "mbkern: inplace=True would overwrite a view of a kind that torch lets nobody write to "
            f"({kind}: of split, chunk, unbind, ...); pass a slice, or a copy"
        )
    check_output(input, "input (inplace=True)", input.detach(), False, others)


class RowLoss(torch.autograd.Function):
    """Losses over rows of classes: ``RowLoss.apply(input, target, request)``.

    ``request`` is a :class:`Request` whose options are RowOptions. Returns the loss: 0-dim, or one
    an item for ``reduction="none"``. Differentiable in the input and in class probabilities.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, request: Request) -> Tensor:
        options: RowOptions = request.options
        call = RowCall(request.loss.number, input, target, options)
        needs_input, needs_target, _ = ctx.needs_input_grad
        hint, inplace = request.grad_scale, request.inplace
        if inplace:
            _check_inplace(input, (call.target, options.weight, options.sample_weight))
        hooked = saved_hooks(False) is not None
        guessed = hint is None and call.compute is not input.dtype
        early = options.reduction != "none" and needs_input and not needs_target
        if early and not hooked and (not guessed or Incoming.will_be_one(input, inplace)):
            # Read now: GradScaler changes its scale in place.
            factor = 1.0 if hint is None else hint_argument(hint)
            grad = input.detach() if inplace else new_gradient(input)
            result, divisor = call.run(grad=grad, scale=factor, loss_dtype=request.loss_dtype)
            # Looked at by create_graph, or if the guess fails.
            ctx.save_for_backward(None, input, target, options.weight, options.sample_weight, None)
            version = _new_version(input) if inplace else -1
            ctx.left = Left(request, divisor, (grad, None, None), factor, version, guessed)
            return result  # type: ignore[return-value]
        state: Tensor | None = call.new_state()
        result, divisor = call.run(state=state, loss_dtype=request.loss_dtype)
        if hooked:
            ctx.left = left_under_hooks(request, divisor, early and not guessed)
        else:
            ctx.left, state = Left(request, divisor, state=state), None
        mark = MARK if hooked else None
        ctx.save_for_backward(mark, input, target, options.weight, options.sample_weight, state)
        return result  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        left: Left = ctx.left
        request, divisor = left.request, left.divisor
        if torch.is_grad_enabled():
            forget_guess(left)
            input, target = ctx.saved_tensors[1:3]
            first, second = _differentiable(
                _composite.row_loss, request, divisor, incoming, input, target
            )
            return first, second, None
        formed = formed_for(left, incoming)
        if formed is not None:
            return hand_out(left, formed, incoming, keep_zeros=True)
        _, input, target, weight, sample_weight, state = ctx.saved_tensors
        options: RowOptions = replace(request.options, weight=weight, sample_weight=sample_weight)
        call = RowCall(request.loss.number, input, target, options)
        if state is None:
            state = left.state
        if state is None:
            state = call.new_state()
            call.run(state=state)
        grad = grad_target = None
        if ctx.needs_input_grad[1]:
            grad_target = gradient_of_probabilities(call, state, incoming, divisor)
        if ctx.needs_input_grad[0] and is_legacy_batched(incoming) and not left.deferred:
            grad = _ops.row_loss_backward(
                incoming, input, target, weight, sample_weight, None, state,
                _ops.divisor_tensor(divisor),
                request.loss.name, options.reduction, options.ignore_index,
                options.label_smoothing, options.z_loss, options.softcap or 0.0, False,
            )  # fmt: skip
        elif ctx.needs_input_grad[0]:
            overwrite = request.inplace and not graph_is_kept()
            overwrite = overwrite and (not left.hooked or is_ours_alone(input))
            grad = input.detach() if overwrite else new_gradient(input)
            if options.reduction == "none":
                call.run(grad=grad, item_scale=incoming, state=state, from_state=True)
            else:
                scale = left.hint
                if not left.deferred:
                    Incoming.is_one(incoming)
                    scale = scalar_argument(incoming, "the incoming gradient")
                call.run(grad=grad, scale=scale, state=state, from_state=True, divisor=divisor)
            if overwrite:
                bump_version(input)
        if not graph_is_kept():
            left.state = None
        if left.deferred:
            return hand_out(left, (grad, None, None), incoming, keep_zeros=True, fresh=True)
        return grad, grad_target, None


def gradient_of_probabilities(
    call: RowCall,
    state: Tensor,
    incoming: Tensor,
    divisor: float | Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """d(result)/d(target) = (1 - eps) w_j (lse - x_j) times the item's factor, by torch; in
    ``dtype``, or the target's."""
    options = call.options
    x = call.input.to(call.compute)
    if options.softcap is not None:
        x = options.softcap * torch.tanh(x / options.softcap)
    dim = 1 if x.dim() > 1 else 0
    shape = call.shape
    maximum, rest = state[0].reshape(shape), state[1].reshape(shape)
    log_sum = torch.log1p(rest.double())
    scale = incoming.to(torch.float64).expand(shape) / divisor
    if call.sample_weight is not None:
        scale = scale * call.sample_weight
    # Not (maximum + log_sum) - x: far from 0 the sum loses digits that the difference keeps.
    grad = (maximum.double().unsqueeze(dim) - x).add_(log_sum.unsqueeze(dim))
    grad = grad * (scale * (1.0 - options.label_smoothing)).unsqueeze(dim)
    if call.weight is not None:
        grad = grad * call.weight.view([-1 if d == dim else 1 for d in range(x.dim())])
    grad = grad.to(dtype or call.target.dtype)
    return grad.masked_fill_(grad.isnan(), math.nan)  # whose bits differ with torch's loops


class TensorLoss(torch.autograd.Function):
    """Losses over up to three tensors: ``TensorLoss.apply(first, second, third, request)``.

    ``request`` is a :class:`Request` whose options are TensorOptions; tensors that a loss does not
    have are None. Returns the loss: 0-dim, or one an item for ``reduction="none"``. Differentiable
    in the arguments that the loss's registry entry says.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor | None, third: Tensor | None, request: Request
    ) -> Tensor:
        options: TensorOptions = request.options
        inputs = (first, second, third)
        call = new_call(request.loss, inputs, options)
        needs = ctx.needs_input_grad[:3]
        hint, inplace = request.grad_scale, request.inplace
        loss_dtype = request.loss_dtype or first.dtype
        if inplace:
            _check_inplace(
                first, (second, third, options.target, options.weight, options.sample_weight)
            )
        hooked = saved_hooks(False) is not None
        guessed = hint is None and not _are_full(inputs, needs)
        early = options.reduction != "none"
        if early and not hooked and (not guessed or Incoming.will_be_one(first, inplace)):
            # Read now: GradScaler changes its scale in place.
            factor = 1.0 if hint is None else hint_argument(hint)
            grads = _gradients(inputs, needs, inplace)
            result, divisor = call.run(grads=grads, scale=factor, loss_dtype=loss_dtype)
            ctx.save_for_backward(
                None, *inputs, options.target, options.weight, options.sample_weight
            )
            version = _new_version(first) if inplace and needs[0] else -1
            ctx.left = Left(request, divisor, (*grads, None), factor, version, guessed)
            return result  # type: ignore[return-value]
        result, divisor = call.run(loss_dtype=loss_dtype)
        if hooked:
            ctx.left = left_under_hooks(request, divisor, early and not guessed)
        else:
            ctx.left = Left(request, divisor)
        mark = MARK if hooked else None
        ctx.save_for_backward(mark, *inputs, options.target, options.weight, options.sample_weight)
        return result  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        left: Left = ctx.left
        request, divisor = left.request, left.divisor
        if torch.is_grad_enabled():
            forget_guess(left)
            saved = ctx.saved_tensors[1:4]
            return (*gradients_with_graph(request, divisor, incoming, *saved), None)
        formed = formed_for(left, incoming)
        if formed is not None:
            return hand_out(left, formed, incoming, keep_zeros=request.options.target is not None)
        _, first, second, third, target, weight, sample_weight = ctx.saved_tensors
        inputs, needs = (first, second, third), ctx.needs_input_grad[:3]
        options: TensorOptions = replace(
            request.options, target=target, weight=weight, sample_weight=sample_weight
        )
        if is_legacy_batched(incoming) and not left.deferred:
            many = _ops.tensor_loss_backward(
                incoming, *inputs, target, weight, sample_weight, None,
                _ops.divisor_tensor(divisor), request.loss.name, options.reduction,
                options.ignore_index, options.parameters, False, *needs,
            )  # fmt: skip
            return (*(g if need else None for g, need in zip(many, needs, strict=True)), None)
        call = new_call(request.loss, inputs, options)
        overwrite = request.inplace and not graph_is_kept()
        overwrite = overwrite and (not left.hooked or is_ours_alone(first))
        grads = _gradients(inputs, needs, overwrite)
        arguments: dict[str, Any] = {
            "want_loss": False, "grads": grads, "loss_dtype": first.dtype,
        }  # fmt: skip
        if options.reduction == "none":
            call.run(item_scale=incoming, **arguments)
        else:
            scale = left.hint
            if not left.deferred:
                Incoming.is_one(incoming)
                scale = scalar_argument(incoming, "the incoming gradient")
            call.run(scale=scale, divisor=divisor, **arguments)
        if overwrite and needs[0]:
            bump_version(first)
        if left.deferred:
            keep_zeros = options.target is not None
            return hand_out(left, (*grads, None), incoming, keep_zeros=keep_zeros, fresh=True)
        return (*grads, None)


def _are_full(inputs: Inputs, needs: tuple[bool, ...]) -> bool:
    """Whether all the gradients have the type that the loss is computed in."""
    first, second, third = inputs
    one = first.dtype
    if third is None and (second is None or second.dtype is one):
        return one is torch.float32 or one is torch.float64
    dtypes = [None if t is None else t.dtype for t in inputs]
    full = torch.float64 if torch.float64 in dtypes else torch.float32
    return all(not need or d is full for d, need in zip(dtypes, needs, strict=True))


def gradients_with_graph(
    request: Request, divisor: float | Tensor, incoming: Tensor, *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of a loss of tensors for create_graph, where it has a formula."""
    return _differentiable(_tensor_formula, request, divisor, incoming, *inputs)


def _tensor_formula(loss: Loss, *rest: Any) -> Tensor:
    *inputs, options, dtype = rest
    return _composite.tensor_loss(loss, tuple(inputs), options, dtype)


def _gradients(inputs: Inputs, needs: tuple[bool, ...], inplace: bool) -> Grads:
    """Memory for the gradients that are needed; the first input's own with ``inplace``."""
    first, second, third = inputs
    return (
        (first.detach() if inplace else new_gradient(first)) if needs[0] else None,
        new_gradient(second) if needs[1] and second is not None else None,
        new_gradient(third) if needs[2] and third is not None else None,
    )


# Function.apply checks for torch.func transforms and unwraps its arguments, at a cost that a small
# loss feels; the callers of these two have checked that there is nothing to do. The node's apply
# looks up whether there is a backward or a vjp.
RowLoss._backward_cls.apply = RowLoss.backward  # type: ignore[attr-defined]
TensorLoss._backward_cls.apply = TensorLoss.backward  # type: ignore[attr-defined]
apply_row = super(torch.autograd.Function, RowLoss).apply
apply_tensors = super(torch.autograd.Function, TensorLoss).apply
