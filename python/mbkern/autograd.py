"""The autograd Functions behind ``mbkern.functional``: a loss is an argument, not a class.

The gradient is formed in forward, in the same pass as the loss, where its factor is known well enough
(fp32 and fp64, or a ``grad_scale`` hint), and multiplied by what the incoming gradient is more; otherwise
(16-bit results, ``reduction="none"``) it is formed in backward from the logits and two saved numbers an
item, so that the incoming gradient is applied in fp32 before the single rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbkern._launch import (
    Number,
    PointwiseCall,
    PointwiseOptions,
    RowCall,
    RowOptions,
    check_output,
    new_gradient,
    scalar_argument,
)
from mbkern._losses import Loss

__all__ = ["PointwiseLoss", "RowLoss"]

_SECOND_BACKWARD = (
    "mbkern: trying to backward through the graph a second time, but the gradient formed in forward has been "
    "handed out. Specify retain_graph=True in the first backward."
)
_DOUBLE_BACKWARD = (
    "mbkern: {name} was asked for a gradient that can itself be differentiated (create_graph=True), which it does "
    "not support; use torch.nn.functional for second derivatives"
)


def _keep_graph() -> bool:
    """Whether the running backward was asked to retain the graph."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(probe()) if probe is not None else True


def _refuse_double_backward(name: str) -> None:
    # once_differentiable does not protect a root loss: its incoming gradient requires no gradient.
    if torch.is_grad_enabled():
        raise RuntimeError(_DOUBLE_BACKWARD.format(name=name))


class _Formed:
    """A gradient formed in forward, and the factor it already holds."""

    __slots__ = ("grad", "hint")

    def __init__(self, grad: Tensor, hint: Number | None) -> None:
        self.grad: Tensor | None = grad
        self.hint = hint

    def take(self, incoming: Tensor) -> Tensor:
        """Hand out the gradient times incoming / hint.

        Our reference is dropped first: AccumulateGrad keeps a gradient that nobody else holds, and
        clones any other.
        """
        grad = self.grad
        if grad is None:
            raise RuntimeError(_SECOND_BACKWARD)
        if _keep_graph():
            grad = grad.clone()
        else:
            self.grad = None
        factor: Any = incoming if self.hint is None else incoming / self.hint
        if grad.device.type == "cpu":
            factor = float(factor)
            if factor == 1.0:
                return grad
        return grad.mul_(factor)


def _bump_version(tensor: Tensor) -> None:
    torch.autograd.graph.increment_version(tensor)


def _check_inplace(input: Tensor, others: tuple[Tensor | None, ...]) -> None:
    base = input._base
    if (input.is_leaf and input.requires_grad) or (base is not None and base.is_leaf and base.requires_grad):
        raise RuntimeError(
            "mbkern: inplace=True would overwrite a leaf that requires grad, or a view of one; pass the result of "
            "a computation, or a copy"
        )
    check_output(input, "input (inplace=True)", input.detach(), False, others)


class RowLoss(torch.autograd.Function):
    """Losses over rows of classes: ``RowLoss.apply(input, target, loss, options, extras...)``.

    Arguments of ``apply``: input, target (Tensors), loss (:class:`mbkern._losses.Loss`), options
    (RowOptions), grad_scale (number, 0-dim tensor or None), inplace (bool), loss_dtype (dtype or None).
    Returns the loss: 0-dim, or one an item for ``reduction="none"``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        loss: Loss,
        options: RowOptions,
        grad_scale: Number | None,
        inplace: bool,
        loss_dtype: torch.dtype | None,
    ) -> Tensor:
        call = RowCall(loss.number, input, target, options)
        ctx.loss, ctx.formed, ctx.inplace = loss, None, inplace
        needs_input, needs_target = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        if inplace:
            _check_inplace(input, (call.target, options.weight, options.sample_weight))
        form = options.reduction != "none" and (call.compute is input.dtype or grad_scale is not None)
        if needs_input and form and not needs_target:
            scale, keep = scalar_argument(grad_scale, "grad_scale")
            grad = input.detach() if inplace else new_gradient(input)
            result, _ = call.run(grad=grad, scale=scale, loss_dtype=loss_dtype)
            del keep
            ctx.formed = _Formed(grad, grad_scale)
            if inplace:
                _bump_version(input)
        elif needs_input or needs_target:
            state = torch.empty((call.state_rows(), call.items), dtype=call.compute)
            result, divisor = call.run(state=state, loss_dtype=loss_dtype)
            ctx.options, ctx.divisor = options, divisor
            ctx.save_for_backward(input, target, state, options.weight, options.sample_weight)
        else:
            result, _ = call.run(loss_dtype=loss_dtype)
        assert result is not None
        return result

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_double_backward(ctx.loss.name)
        rest = (None,) * 5
        if ctx.formed is not None:
            return (ctx.formed.take(incoming), None, *rest)
        input, target, state, weight, sample_weight = ctx.saved_tensors
        options: RowOptions = ctx.options
        call = RowCall(ctx.loss.number, input, target, options)
        grad = grad_target = None
        if ctx.needs_input_grad[1]:
            grad_target = _gradient_of_probabilities(call, state, incoming, ctx.divisor)
        if ctx.needs_input_grad[0]:
            overwrite = ctx.inplace and not _keep_graph()
            grad = input.detach() if overwrite else new_gradient(input)
            if options.reduction == "none":
                call.run(grad=grad, item_scale=incoming, state=state, from_state=True)
            else:
                scale, keep = scalar_argument(incoming, "the incoming gradient")
                call.run(grad=grad, scale=scale, state=state, from_state=True, divisor=ctx.divisor)
                del keep
            if overwrite:
                _bump_version(input)
        return (grad, grad_target, *rest)


def _gradient_of_probabilities(call: RowCall, state: Tensor, incoming: Tensor, divisor: float) -> Tensor:
    """d(result)/d(target) = (1 - eps) w_j (lse - x_j) times the item's factor, by torch operations."""
    options = call.options
    x = call.input.to(call.compute)
    if options.softcap is not None:
        x = options.softcap * torch.tanh(x / options.softcap)
    dim = 1 if x.dim() > 1 else 0
    shape = call.shape
    maximum, rest = state[0].reshape(shape), state[1].reshape(shape)
    lse = maximum.double() + torch.log(rest.double())
    scale = incoming.to(torch.float64).expand(shape) / divisor
    if call.sample_weight is not None:
        scale = scale * call.sample_weight
    grad = (lse.unsqueeze(dim) - x) * (scale * (1.0 - options.label_smoothing)).unsqueeze(dim)
    if call.weight is not None:
        grad = grad * call.weight.view([-1 if d == dim else 1 for d in range(x.dim())])
    return grad.to(call.target.dtype)


class PointwiseLoss(torch.autograd.Function):
    """Element-wise losses of an input and a target of one shape.

    Arguments of ``apply``: input, target (Tensors), loss (:class:`mbkern._losses.Loss`), options
    (PointwiseOptions), grad_scale (number, 0-dim tensor or None), inplace (bool), loss_dtype (dtype).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        loss: Loss,
        options: PointwiseOptions,
        grad_scale: Number | None,
        inplace: bool,
        loss_dtype: torch.dtype,
    ) -> Tensor:
        call = PointwiseCall(loss.number, input, target, options)
        ctx.loss, ctx.inplace, ctx.formed = loss, inplace, None
        needs = ctx.needs_input_grad[:2]
        if inplace:
            _check_inplace(input, (target, options.weight))
        tensors = (input, target)
        form = options.reduction != "none" and (
            grad_scale is not None
            or all(t.dtype is call.compute for t, need in zip(tensors, needs, strict=True) if need)
        )
        if any(needs) and form:
            scale, keep = scalar_argument(grad_scale, "grad_scale")
            grads = _gradients(tensors, needs, inplace)
            result, _ = call.run(grads=grads, scale=scale, loss_dtype=loss_dtype)
            del keep
            ctx.formed = tuple(_Formed(g, grad_scale) if g is not None else None for g in grads)
            if inplace and needs[0]:
                _bump_version(input)
        else:
            result, divisor = call.run(loss_dtype=loss_dtype)
            if any(needs):
                ctx.options, ctx.divisor, ctx.loss_dtype = options, divisor, loss_dtype
                ctx.save_for_backward(input, target, options.weight)
        assert result is not None
        return result

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_double_backward(ctx.loss.name)
        rest = (None,) * 5
        if ctx.formed is not None:
            return (*(f.take(incoming) if f is not None else None for f in ctx.formed), *rest)
        input, target, _ = ctx.saved_tensors
        options: PointwiseOptions = ctx.options
        call = PointwiseCall(ctx.loss.number, input, target, options)
        overwrite = ctx.inplace and not _keep_graph()
        grads = _gradients((input, target), ctx.needs_input_grad[:2], overwrite)
        if options.reduction == "none":
            call.run(want_loss=False, grads=grads, item_scale=incoming, loss_dtype=ctx.loss_dtype)
        else:
            scale, keep = scalar_argument(incoming, "the incoming gradient")
            call.run(want_loss=False, grads=grads, scale=scale, divisor=ctx.divisor, loss_dtype=ctx.loss_dtype)
            del keep
        if overwrite and ctx.needs_input_grad[0]:
            _bump_version(input)
        return (*grads, *rest)


def _gradients(
    tensors: tuple[Tensor, Tensor], needs: tuple[bool, bool], inplace: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the gradients that are needed; the input's own with ``inplace``."""
    input, target = tensors
    first = (input.detach() if inplace else new_gradient(input)) if needs[0] else None
    return first, (new_gradient(target) if needs[1] else None)
