"""The losses over registered operators: under torch.compile, torch.func, fake tensors, modes.

One autograd Function a kind of loss, in the form that functorch and Dynamo both take, with the
operators of ``_ops`` inside. ``inplace`` is ignored here: a compiler plans the memory itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.nn import Parameter

from mbkern import _composite, _ops
from mbkern._arguments import (
    Number,
    check_row_options,
    check_row_shapes,
)
from mbkern._launch import RowOptions
from mbkern._launch_tensors import Inputs, TensorOptions
from mbkern._losses import Loss, find
from mbkern._tensors import calls_are_watched, on_cuda

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_functorch_active = torch._C._are_functorch_transforms_active
_jit_tracing = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling


def is_traced() -> bool:
    """Whether somebody is to see every operation: a compiler, a mode or a transform of torch.

    The shortest way (``_autograd_plain``) has the compiled module ask the same.
    """
    return (
        _is_compiling()
        or ((_dispatch_modes() > 0 or _function_modes() > 0) and calls_are_watched())
        or _functorch_active()
        or _jit_tracing() is not None
        or forward_ad._current_level >= 0
    )


def is_needed(input: Tensor, target: Tensor | None, third: Tensor | None = None) -> bool:
    """Whether a call may not take the shortest way, straight from plain tensors to a kernel."""
    return (
        is_traced()
        or (type(input) is not Tensor and type(input) is not Parameter)
        or (type(target) is not Tensor and type(target) is not Parameter and target is not None)
        or (third is not None and type(third) is not Tensor and type(third) is not Parameter)
        or not (input.is_cpu or on_cuda(input))
    )


def _may_form(input: Tensor) -> bool:
    """Whether forward may form the gradient and hand it to backward behind the graph's back.

    Not on CUDA: a graph that was captured there replays kernels, not the code that hands it over.
    """
    return torch.is_grad_enabled() and not input.is_cuda


def _is_full(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def wants_formula() -> bool:
    """Where the operators would lose derivatives: forward mode, which kernels do not have;
    TorchScript's tracer and torch.export, which see no Function; a transform inside a compiled
    function, where Dynamo does not say which tensors are differentiated; functionalize, which has
    no rule for a Function.
    """
    if _is_compiling():
        return _functorch_active() or _is_exporting()
    return (
        forward_ad._current_level >= 0
        or _jit_tracing() is not None
        or (_functorch_active() and _is_functionalized())
    )


def _is_functionalized() -> bool:
    return any(
        interpreter.key() == torch._C._functorch.TransformType.Functionalize
        for interpreter in retrieve_all_functorch_interpreters()
    )


def _is_differentiated(*inputs: Tensor | None) -> bool:
    # Inside vmap a tensor does not say that it is differentiated outside.
    return torch.is_grad_enabled() and (
        _functorch_active() or any(t is not None and t.requires_grad for t in inputs)
    )


def _differentiate(forward: Any, function: type[torch.autograd.Function], backward: Any) -> None:
    """Give an operator the derivative of its Function, for graphs that were traced without one."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"mbkern: a graph with {backward} cannot be differentiated again; trace the loss, not "
            "its gradient"
        )

    library.register_autograd(forward, function.backward, setup_context=function.setup_context)
    library.register_autograd(backward, refuse)


# ---- row losses ----------------------------------------------------------------------------------


def row_loss(
    loss: Loss,
    input: Tensor,
    target: Tensor,
    options: RowOptions,
    grad_scale: Number | None,
    dtype: torch.dtype,
) -> Tensor:
    """A row loss, traceable, differentiable under every transform."""
    o = options
    check_row_shapes(input, target, o.ignore_index)
    check_row_options(o.label_smoothing, o.z_loss, o.softcap)
    if wants_formula():
        return _composite.row_loss(loss, input, target, o, dtype)
    form = (
        o.reduction != "none"
        and not target.is_floating_point()
        and (_is_full(input.dtype) or grad_scale is not None)
        and input.requires_grad
        and _may_form(input)
    )
    arguments = (
        input, target, o.weight, o.sample_weight, _ops.scalar_tensor(o.denominator, input),
        _ops.scalar_tensor(grad_scale, input), loss.name, o.reduction, o.ignore_index,
        o.label_smoothing, o.z_loss, o.softcap or 0.0, form, dtype,
    )  # fmt: skip
    apply: Any = _RowLoss.apply if _is_differentiated(input, target) else _ops.row_loss
    result: Tensor = apply(*arguments)[0]
    return result


def _row_options(fields: tuple[Any, ...], denominator: Tensor | None) -> RowOptions:
    weight, sample_weight, _, reduction, ignore_index, smoothing, z_loss, softcap = fields
    return RowOptions(
        weight, sample_weight, ignore_index, smoothing, z_loss, softcap or None, reduction,
        denominator,
    )  # fmt: skip


class _RowLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        denominator: Tensor | None,
        grad_scale: Tensor | None,
        loss: str,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        form: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _ops.row_loss(
            input, target, weight, sample_weight, denominator, grad_scale, loss, reduction,
            ignore_index, label_smoothing, z_loss, softcap, form, dtype,
        )  # fmt: skip
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, sample_weight, denominator, grad_scale = inputs[:6]
        _, state, divisor = output
        ctx.mark_non_differentiable(state, divisor)
        ctx.save_for_backward(
            input, target, weight, sample_weight, denominator, grad_scale, state, divisor
        )
        ctx.options, ctx.form, ctx.dtype = inputs[6:12], inputs[12], inputs[13]
        ctx.wants_target = target.is_floating_point()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        input, target, weight, sample_weight, denominator, grad_scale = saved[:6]
        grad = grad_target = None
        if ctx.needs_input_grad[0]:
            arguments = (
                incoming, input, target, weight, sample_weight, denominator, grad_scale,
                *saved[6:], *ctx.options, ctx.form, ctx.dtype,
            )  # fmt: skip
            if torch.compiler.is_compiling():
                grad = _RowGradient.forward(*arguments)
            else:
                grad = _RowGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        if ctx.wants_target and ctx.needs_input_grad[1]:
            options = _row_options((weight, sample_weight, *ctx.options), denominator)

            def of_target(t: Tensor) -> Tensor:
                return _composite.row_loss(find(ctx.options[0]), input, t, options, ctx.dtype)

            grad_target = torch.func.vjp(of_target, target)[1](incoming)[0]
        return (grad, grad_target, *(None,) * 12)


class _RowGradient(torch.autograd.Function):
    """The gradient as a differentiable function of the incoming gradient and the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        incoming: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        denominator: Tensor | None,
        grad_scale: Tensor | None,
        state: Tensor,
        divisor: Tensor,
        *rest: Any,
    ) -> Tensor:
        *options, form, _ = rest
        result: Tensor = _ops.row_loss_backward(
            incoming, input, target, weight, sample_weight, grad_scale, state, divisor, *options,
            form,
        )  # fmt: skip
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        *ctx.options, _, ctx.dtype = inputs[9:]
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
        incoming, input, target, weight, sample_weight, denominator = ctx.saved_tensors
        options = _row_options((weight, sample_weight, *ctx.options), denominator)
        loss = find(ctx.options[0])

        def gradient(incoming: Tensor, input: Tensor) -> Tensor:
            def value(x: Tensor) -> Tensor:
                return _composite.row_loss(loss, x, target, options, ctx.dtype)

            result: Tensor = torch.func.vjp(value, input)[1](incoming)[0]
            return result

        first, second = torch.func.vjp(gradient, incoming, input)[1](grad_grad)
        return (first, second, *(None,) * (ctx.count - 2))


_differentiate(_ops.row_loss, _RowLoss, _ops.row_loss_backward)


# ---- losses over several tensors -----------------------------------------------------------------


def tensor_loss(
    loss: Loss,
    inputs: Inputs,
    options: TensorOptions,
    grad_scale: Number | None,
    dtype: torch.dtype,
) -> Tensor:
    """A loss over several tensors, traceable, differentiable under every transform."""
    o = options
    if wants_formula():
        return _composite.tensor_loss(loss, inputs, o, dtype)
    first, second, third = inputs
    hinted = grad_scale is not None
    may_form = o.reduction != "none" and _may_form(first)
    form = (
        may_form and t is not None and t.requires_grad and (hinted or _is_full(t.dtype))
        for t in inputs
    )
    if second is first:
        second = first.view_as(first)  # Dynamo takes no tensor twice
    if third is not None and (third is first or third is inputs[1]):
        third = third.view_as(third)
    arguments = (
        first, second, third, o.target, o.weight, o.sample_weight,
        _ops.scalar_tensor(o.denominator, first), _ops.scalar_tensor(grad_scale, first), loss.name,
        o.reduction, o.ignore_index, o.parameters, *form, dtype,
    )  # fmt: skip
    apply: Any = _TensorLoss.apply if _is_differentiated(*inputs) else _ops.tensor_loss
    result: Tensor = apply(*arguments)[0]
    return result


class _TensorLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        target: Tensor | None,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        denominator: Tensor | None,
        grad_scale: Tensor | None,
        loss: str,
        reduction: str,
        ignore_index: int,
        parameters: tuple[float, ...],
        form_first: bool,
        form_second: bool,
        form_third: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _ops.tensor_loss(
            first, second, third, target, weight, sample_weight, denominator, grad_scale, loss,
            reduction, ignore_index, parameters, form_first, form_second, form_third, dtype,
        )  # fmt: skip
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, divisor = output
        ctx.mark_non_differentiable(divisor)
        ctx.save_for_backward(*inputs[:8], divisor)
        ctx.options, ctx.dtype = inputs[8:12], inputs[15]
        ctx.form = inputs[12] or inputs[13] or inputs[14]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        present = (True, ctx.saved_tensors[1] is not None, ctx.saved_tensors[2] is not None)
        needs = tuple(n and p for n, p in zip(ctx.needs_input_grad[:3], present, strict=True))
        arguments = (incoming, *ctx.saved_tensors, *ctx.options, ctx.form, *needs, ctx.dtype)
        if torch.compiler.is_compiling():
            grads = _TensorGradient.forward(*arguments)
        else:
            grads = _TensorGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        found = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return (*found, *(None,) * 13)


class _TensorGradient(torch.autograd.Function):
    """The gradients as a differentiable function of the incoming gradient and the inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        incoming: Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        target: Tensor | None,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        denominator: Tensor | None,
        grad_scale: Tensor | None,
        divisor: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *options, form, need_first, need_second, need_third, _ = rest
        result: tuple[Tensor, ...] = _ops.tensor_loss_backward(
            incoming, first, second, third, target, weight, sample_weight, grad_scale, divisor,
            *options, form, need_first, need_second, need_third,
        )  # fmt: skip
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:8])
        *ctx.options, _, first, second, third, ctx.dtype = inputs[10:]
        ctx.needs = (first, second, third)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> tuple[Tensor | None, ...]:
        incoming, *inputs, target, weight, sample_weight, denominator = ctx.saved_tensors
        name, reduction, ignore_index, parameters = ctx.options
        options = TensorOptions(
            target, weight, sample_weight, reduction, denominator, ignore_index, tuple(parameters)
        )
        wanted = [k for k in (0, 1, 2) if ctx.needs[k]]
        there = [k for k in (0, 1, 2) if inputs[k] is not None]

        def gradients(incoming: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            def value(*tensors: Tensor) -> Tensor:
                all_three = dict(zip(there, tensors, strict=True))
                arguments = (all_three[0], all_three.get(1), all_three.get(2))
                return _composite.tensor_loss(find(name), arguments, options, ctx.dtype)

            found = dict(zip(there, torch.func.vjp(value, *tensors)[1](incoming), strict=True))
            return tuple(found[k] for k in wanted)

        pull = torch.func.vjp(gradients, incoming, *(inputs[k] for k in there))[1]
        of_incoming, *rest = pull(tuple(grad_grads[k] for k in wanted))
        found = dict(zip(there, rest, strict=True))
        return (of_incoming, *(found.get(k) for k in (0, 1, 2)), *(None,) * (ctx.count - 4))


_differentiate(_ops.tensor_loss, _TensorLoss, _ops.tensor_loss_backward)
