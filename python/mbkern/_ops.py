"""The losses as registered operators, ``torch.ops.mbkern.*``, for everything that traces.

torch.compile, torch.export, fake tensors, torch.func and dispatch modes see these; eager calls on
plain tensors go straight to the kernels. Every operator serves all losses of its kind: the loss is
an argument. Backward is an operator of its own, and the autograd Functions are outside
(``_traced``), so that a tracer sees both halves.

A gradient that is formed in forward stays out of the traced graph: the storage of the divisor that
the forward operator returns owns it, and the backward operator takes it from there. It must not be
an output of the graph, because backward hands it out without a copy, and a compiler assumes that an
operator's output is not one of its inputs. Where the divisor is copied, or used a second time, the
gradient is computed again, with the same bits.

After a large kernel all of this runs from cold caches, where each Python call costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from mbkern import _C
from mbkern._arguments import Number
from mbkern._calls import new_call
from mbkern._launch import (
    RowCall,
    RowOptions,
    hint_argument,
    new_gradient,
    new_scalar,
    rescale_on_device,
    scale_dense,
)
from mbkern._launch_tensors import Grads, Inputs, TensorCall, TensorOptions
from mbkern._losses import find
from mbkern._tensors import on_cuda

_ROW_OPTIONS = (
    "str loss, str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap"
)
_SCHEMAS = {
    "row_loss": (
        "(Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, "
        f"Tensor? denominator, Tensor? grad_scale, {_ROW_OPTIONS}, bool form, ScalarType dtype) "
        "-> (Tensor loss, Tensor state, Tensor divisor)"
    ),
    "row_loss_backward": (
        "(Tensor incoming, Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, "
        "Tensor? grad_scale, Tensor state, Tensor divisor, "
        f"{_ROW_OPTIONS}, bool form) -> Tensor"
    ),
    "tensor_loss": (
        "(Tensor first, Tensor? second, Tensor? third, Tensor? target, Tensor? weight, "
        "Tensor? sample_weight, Tensor? denominator, Tensor? grad_scale, str loss, "
        "str reduction, int ignore_index, float[] parameters, bool form_first, "
        "bool form_second, bool form_third, ScalarType dtype) "
        "-> (Tensor loss, Tensor divisor)"
    ),
    "tensor_loss_backward": (
        "(Tensor incoming, Tensor first, Tensor? second, Tensor? third, Tensor? target, "
        "Tensor? weight, Tensor? sample_weight, Tensor? grad_scale, Tensor divisor, str loss, "
        "str reduction, int ignore_index, float[] parameters, bool form, bool need_first, "
        "bool need_second, bool need_third) "
        "-> (Tensor grad_first, Tensor grad_second, Tensor grad_third)"
    ),
}


# ---- gradients formed in forward -----------------------------------------------------------------


def new_number(like: Tensor) -> Tensor:
    """Memory for an fp64 number beside a tensor. Before a large kernel it costs a microsecond;
    after it, from caches that the kernel has emptied, forty."""
    if on_cuda(like):
        return like.new_empty((), dtype=torch.float64)
    return new_scalar(torch.float64)  # type: ignore[return-value]


def scalar_tensor(value: Number | None, like: Tensor) -> Tensor | None:
    """A number as an operator's argument."""
    if value is None or isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        # A factor may change from call to call; torch.full would be compiled anew for each number.
        return torch.ones((), dtype=torch.float64, device=like.device) * value
    return torch.full((), value, dtype=torch.float64, device=like.device)


def divisor_tensor(
    value: float | Tensor, grads: tuple[Tensor | None, ...] = (), memory: Tensor | None = None
) -> Tensor:
    """The divisor of a mean as a tensor whose storage owns the gradients formed in forward."""
    if isinstance(value, Tensor):  # on the device
        divisor = value
    else:
        divisor = new_scalar(torch.float64) if memory is None else memory  # type: ignore[assignment]
        divisor.fill_(value)
    divisor.untyped_storage().grads = grads  # type: ignore[attr-defined]
    return divisor


def _take_grads(divisor: Tensor) -> tuple[Tensor | None, ...] | None:
    storage: Any = divisor.untyped_storage()  # the object that was given the gradients
    grads: tuple[Tensor | None, ...] | None = getattr(storage, "grads", None)
    storage.grads = None
    return grads


# ---- what runs -----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Drop a subclass that adds nothing below ``__torch_function__``; the kernels refuse others."""
    if type(value) is Tensor or not isinstance(value, Tensor):
        return value
    if type(value).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        return value.detach().as_subclass(Tensor)
    return value


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make an operator of a kernel, which is given plain tensors."""
    name = f"mbkern::{name}"
    library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, ("cpu", "cuda"), lambda *args: kernel(*map(_plain, args)))
    library.register_fake(name, fake)


def _row_call(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    options: tuple[Any, ...],
) -> RowCall:
    loss, reduction, ignore_index, label_smoothing, z_loss, softcap = options
    row = RowOptions(
        weight, sample_weight, ignore_index, label_smoothing, z_loss,
        softcap if softcap != 0.0 else None, reduction, denominator,
    )  # fmt: skip
    return RowCall(find(loss).number, input, target, row)


def _row_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    grad_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, form, dtype = rest
    call = _row_call(input, target, weight, sample_weight, denominator, tuple(options))
    grad = new_gradient(input) if form else None
    state, memory = None if form else call.new_state(), new_number(input)
    # Filled: what is in fresh memory would be compared, and may be no number.
    unused = new_number(input).zero_() if state is None else state
    scale = 1.0 if grad_scale is None else hint_argument(grad_scale)
    loss, divisor = call.run(grad=grad, scale=scale, state=state, loss_dtype=dtype)
    assert loss is not None
    return loss, unused, divisor_tensor(divisor, (grad,), memory)


def _rescaled(
    grad: Tensor, incoming: Tensor, hint: float | Tensor, of_rows: bool = False
) -> Tensor:
    """A gradient that holds the factor ``hint``, times what the incoming gradient is more."""
    if on_cuda(grad):
        return rescale_on_device(grad, incoming, hint, keep_zeros=of_rows)
    value = _C.scalar_value(incoming)
    factor: float = (incoming.item() if value is None else value) / hint  # type: ignore[assignment]
    return grad if factor == 1.0 else scale_dense(grad, factor, keep_zeros=of_rows)


def _row_loss_backward(
    incoming: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    grad_scale: Tensor | None,
    state: Tensor,
    divisor: Tensor,
    *rest: Any,
) -> Tensor:
    *options, form = rest
    if form:
        hint = 1.0 if grad_scale is None else hint_argument(grad_scale)
        (grad,) = _take_grads(divisor) or (None,)
        if grad is None:  # as in forward
            given = divisor if options[1] == "mean" else None
            grad = new_gradient(input)
            call = _row_call(input, target, weight, sample_weight, given, tuple(options))
            call.run(grad=grad, scale=hint)
        return _rescaled(grad, incoming, hint, True)
    call = _row_call(input, target, weight, sample_weight, None, tuple(options))
    grad = new_gradient(input)
    arguments: dict[str, Any] = {"grad": grad, "state": state.contiguous(), "from_state": True}
    if call.options.reduction == "none":
        call.run(item_scale=incoming, **arguments)
    else:
        call.run(scale=incoming.detach(), divisor=divisor.detach(), **arguments)
    return grad


def _tensor_call(
    inputs: Inputs,
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    options: tuple[Any, ...],
) -> TensorCall:
    loss, reduction, ignore_index, parameters = options
    asked = TensorOptions(
        target, weight, sample_weight, reduction, denominator, ignore_index, tuple(parameters)
    )
    return new_call(find(loss), inputs, asked)


def new_gradients(inputs: Inputs, needs: Sequence[bool]) -> Grads:
    """Memory for the gradients that are needed."""
    first, second, third = (
        new_gradient(t) if need and t is not None else None
        for t, need in zip(inputs, needs, strict=True)
    )
    return first, second, third


def _tensor_loss(
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    grad_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *options, form_first, form_second, form_third, dtype = rest
    inputs, form = (first, second, third), (form_first, form_second, form_third)
    call = _tensor_call(inputs, target, weight, sample_weight, denominator, tuple(options))
    grads, memory = new_gradients(inputs, form), new_number(first)
    scale = 1.0 if grad_scale is None else hint_argument(grad_scale)
    loss, divisor = call.run(grads=grads, scale=scale, loss_dtype=dtype)
    assert loss is not None
    return loss, divisor_tensor(divisor, grads, memory)


def _tensor_loss_backward(
    incoming: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    grad_scale: Tensor | None,
    divisor: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *options, form, need_first, need_second, need_third = rest
    needs = (need_first, need_second, need_third)
    hint = 1.0 if grad_scale is None else hint_argument(grad_scale)
    inputs = (first, second, third)
    found: Any = _take_grads(divisor) if form else None
    if found is None or any(g is None and n for g, n in zip(found, needs, strict=True)):
        found = new_gradients(inputs, needs)
        call = _tensor_call(inputs, target, weight, sample_weight, None, tuple(options))
        arguments: dict[str, Any] = {
            "want_loss": False, "grads": found, "loss_dtype": first.dtype,
        }  # fmt: skip
        if call.options.reduction == "none":
            call.run(item_scale=incoming, **arguments)
        else:
            scale = hint if form else incoming.detach()
            call.run(scale=scale, divisor=divisor.detach(), **arguments)
    if form:
        found = tuple(
            None if g is None else _rescaled(g, incoming, hint, target is not None) for g in found
        )
    return tuple(
        g if g is not None and need else first.new_empty(0)
        for g, need in zip(found, needs, strict=True)
    )


# ---- shapes and dtypes ---------------------------------------------------------------------------


def _fake_row_loss(input: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, form, dtype = rest[5], rest[-2], rest[-1]
    if not input.is_floating_point() or input.dim() == 0:
        raise TypeError(
            f"mbkern: input must be floating and have a class dimension, not {tuple(input.shape)} "
            f"{input.dtype}"
        )
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size(())
    has_index = not target.is_floating_point()
    if tuple(target.shape) != tuple(shape if has_index else input.shape):
        raise ValueError(
            f"mbkern: target has shape {tuple(target.shape)}; for an input of "
            f"{tuple(input.shape)} it must be {tuple(shape)} (class indices) or "
            f"{tuple(input.shape)} (class probabilities)"
        )
    compute = torch.float64 if input.dtype is torch.float64 else torch.float32
    items = 1
    for size in shape:
        items = items * size
    return (
        input.new_empty(shape if reduction == "none" else (), dtype=dtype),
        input.new_empty((), dtype=torch.float64)
        if form
        else input.new_empty((2 if has_index else 3, items), dtype=compute),
        input.new_empty((), dtype=torch.float64),
    )


def _fake_row_loss_backward(incoming: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


def _fake_tensor_loss(first: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    name, reduction, dtype = rest[7], rest[8], rest[-1]
    if reduction != "none":
        loss = first.new_empty((), dtype=dtype)
    elif find(name).kind == "pointwise":
        loss = torch.empty_like(first, dtype=dtype)
    else:
        shape = first.shape
        loss = first.new_empty(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=dtype)
    return (
        loss,
        first.new_empty((), dtype=torch.float64),
    )


def _fake_tensor_loss_backward(incoming: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t) if need and t is not None else rest[0].new_empty(0)
        for t, need in zip(rest[:3], rest[-3:], strict=True)
    )


# ---- registration --------------------------------------------------------------------------------


def _each(operator: Callable[..., Any], *forms: int) -> Callable[..., Any]:
    """The vmap rule: one call an element, so that each has the bits of a call of its own.

    ``forms``: positions of the arguments that ask for a gradient in forward; it would be lost when
    the divisors are stacked.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        def element(value: Any, dim: int | None, i: int) -> Any:
            if dim is None or not isinstance(value, Tensor):  # of a list of numbers it is a list
                return value
            if info.batch_size == 0:  # only the shapes are used
                return value.new_zeros(value.shape[:dim] + value.shape[dim + 1 :])
            return value.select(dim, i)

        args = tuple(False if k in forms else a for k, a in enumerate(args))
        calls = [
            operator(*(element(a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(max(info.batch_size, 1))
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls)[: info.batch_size], 0
        results = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...]]] = {
    "row_loss": (_row_loss, _fake_row_loss, (12,)),
    "row_loss_backward": (_row_loss_backward, _fake_row_loss_backward, ()),
    "tensor_loss": (_tensor_loss, _fake_tensor_loss, (12, 13, 14)),
    "tensor_loss_backward": (_tensor_loss_backward, _fake_tensor_loss_backward, ()),
}

for _name, (_kernel, _fake, _forms) in _KERNELS.items():
    register(_name, _SCHEMAS[_name], _kernel, _fake)
    _operator = getattr(torch.ops.mbkern, _name).default
    library.register_vmap(f"mbkern::{_name}", _each(_operator, *_forms))

row_loss = torch.ops.mbkern.row_loss.default
row_loss_backward = torch.ops.mbkern.row_loss_backward.default
tensor_loss = torch.ops.mbkern.tensor_loss.default
tensor_loss_backward = torch.ops.mbkern.tensor_loss_backward.default
