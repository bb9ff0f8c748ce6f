"""The losses as registered operators, ``torch.ops.mbkern.*``, for everything that traces.

torch.compile, torch.export, fake tensors, torch.func and dispatch modes see these; eager calls on
plain tensors go straight to the kernels. Every operator serves all losses of its kind: the loss is
an argument. Backward is an operator of its own, and the autograd Functions are outside
(``_traced``), so that a tracer sees both halves.

A gradient that is formed in forward stays out of the traced graph: the forward operator returns a
token, a tiny tensor whose memory owns the gradient, and the backward operator takes the gradient
from it. It must not be an output of the graph, because backward hands it out without a copy, and a
compiler assumes that an operator's output is not one of its inputs. Where the token is copied, or
used a second time, the gradient is computed again, with the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbkern._launch import (
    RowCall,
    RowOptions,
    hint_argument,
    new_gradient,
    rescale_on_device,
    scale_dense,
)
from mbkern._launch_pointwise import PointwiseCall, PointwiseOptions
from mbkern._losses import find
from mbkern._tensors import on_cuda

LIBRARY = torch.library.Library("mbkern", "DEF")  # type: ignore[no-untyped-call]

_ROW_OPTIONS = (
    "str loss, str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap"
)
_SCHEMAS = {
    "row_loss": (
        "(Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, "
        f"Tensor? denominator, Tensor? grad_scale, {_ROW_OPTIONS}, bool form, ScalarType dtype) "
        "-> (Tensor loss, Tensor state, Tensor divisor, Tensor token)"
    ),
    "row_loss_backward": (
        "(Tensor incoming, Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, "
        "Tensor? grad_scale, Tensor state, Tensor divisor, Tensor token, "
        f"{_ROW_OPTIONS}, bool form) -> Tensor"
    ),
    "pointwise_loss": (
        "(Tensor input, Tensor target, Tensor? weight, Tensor? denominator, Tensor? grad_scale, "
        "str loss, str reduction, float parameter, bool form_input, bool form_target, "
        "ScalarType dtype) -> (Tensor loss, Tensor divisor, Tensor token)"
    ),
    "pointwise_loss_backward": (
        "(Tensor incoming, Tensor input, Tensor target, Tensor? weight, Tensor? grad_scale, "
        "Tensor divisor, Tensor token, str loss, str reduction, float parameter, bool form, "
        "bool need_input, bool need_target) -> (Tensor grad_input, Tensor grad_target)"
    ),
}


# ---- gradients formed in forward -----------------------------------------------------------------


class _Token(np.ndarray[Any, Any]):
    """One number whose memory keeps gradients alive until a backward takes them."""

    grads: tuple[Tensor | None, ...] | None


_tokens: weakref.WeakValueDictionary[int, _Token] = weakref.WeakValueDictionary()


def new_token(like: Tensor, grads: tuple[Tensor | None, ...] | None = None) -> Tensor:
    """A token for ``grads``; they lie on the CPU, for the token's memory does."""
    if grads is None:
        return torch.zeros(1, dtype=torch.int64, device=like.device)
    owner = np.zeros(1, dtype=np.int64).view(_Token)
    owner.grads = grads
    token = torch.from_numpy(owner)  # the storage holds `owner`
    _tokens[token.data_ptr()] = owner
    return token


def _take(token: Tensor) -> tuple[Tensor | None, ...] | None:
    owner = _tokens.pop(token.data_ptr(), None)
    if owner is None:
        return None
    grads, owner.grads = owner.grads, None
    return grads


def divisor_tensor(divisor: float | Tensor) -> Tensor:
    """The divisor that a call returned, as a tensor on the call's device."""
    if isinstance(divisor, Tensor):
        return divisor
    return torch.tensor(divisor, dtype=torch.float64, device="cpu")


# ---- what runs -----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Drop a subclass that adds nothing below ``__torch_function__``; the kernels refuse others."""
    if type(value) is Tensor or not isinstance(value, Tensor):
        return value
    if type(value).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        return value.detach().as_subclass(Tensor)
    return value


def _of_plain(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: kernel(*map(_plain, args))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, form, dtype = rest
    call = _row_call(input, target, weight, sample_weight, denominator, tuple(options))
    call.explain()  # before memory of these shapes is allocated
    grad = new_gradient(call.input) if form else None
    state = call.new_state()
    scale = 1.0 if grad_scale is None else hint_argument(grad_scale)
    loss, divisor = call.run(grad=grad, scale=scale, state=state, loss_dtype=dtype)
    assert loss is not None
    token = new_token(input, None if grad is None else (grad,))
    return loss, state, divisor_tensor(divisor), token


def _rescaled(
    grad: Tensor, incoming: Tensor, hint: float | Tensor, of_rows: bool = False
) -> Tensor:
    """A gradient that holds the factor ``hint``, times what the incoming gradient is more."""
    if on_cuda(grad):
        return rescale_on_device(grad, incoming, hint, keep_zeros=of_rows)
    factor: float = incoming.item() / hint  # type: ignore[assignment]  # a number here
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
    token: Tensor,
    *rest: Any,
) -> Tensor:
    *options, form = rest
    hint = 1.0 if grad_scale is None else hint_argument(grad_scale)
    if form:
        formed = _take(token)
        if formed is not None and formed[0] is not None:
            return _rescaled(formed[0], incoming, hint, True)
    call = _row_call(input, target, weight, sample_weight, None, tuple(options))
    grad = new_gradient(call.input)
    arguments: dict[str, Any] = {"grad": grad, "state": state.contiguous(), "from_state": True}
    if call.options.reduction == "none":
        call.run(item_scale=incoming, **arguments)
    elif form:
        call.run(scale=hint, divisor=divisor.detach(), **arguments)
        return _rescaled(grad, incoming, hint, True)
    else:
        call.run(scale=incoming.detach(), divisor=divisor.detach(), **arguments)
    return grad


def _pointwise_call(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    options: tuple[Any, ...],
) -> PointwiseCall:
    loss, reduction, parameter = options
    pointwise = PointwiseOptions(weight, reduction, denominator, parameter)
    return PointwiseCall(find(loss).number, input, target, pointwise)


def _pointwise_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    grad_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, form_input, form_target, dtype = rest
    call = _pointwise_call(input, target, weight, denominator, tuple(options))
    call.explain()
    grads = (
        new_gradient(call.input) if form_input else None,
        new_gradient(call.target) if form_target else None,
    )
    scale = 1.0 if grad_scale is None else hint_argument(grad_scale)
    loss, divisor = call.run(grads=grads, scale=scale, loss_dtype=dtype)
    assert loss is not None
    token = new_token(input, grads if form_input or form_target else None)
    return loss, divisor_tensor(divisor), token


def _pointwise_loss_backward(
    incoming: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_scale: Tensor | None,
    divisor: Tensor,
    token: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *options, form, need_input, need_target = rest
    hint = 1.0 if grad_scale is None else hint_argument(grad_scale)
    needs = (need_input, need_target)
    call = _pointwise_call(input, target, weight, None, tuple(options))
    grads = _take(token) if form else None
    if grads is None or any(g is None and n for g, n in zip(grads, needs, strict=True)):
        grads = tuple(
            new_gradient(t) if need else None
            for t, need in zip((call.input, call.target), needs, strict=True)
        )
        arguments: dict[str, Any] = {
            "want_loss": False, "grads": grads, "loss_dtype": call.input.dtype,
        }  # fmt: skip
        if call.options.reduction == "none":
            call.run(item_scale=incoming, **arguments)
        else:
            scale = hint if form else incoming.detach()
            call.run(scale=scale, divisor=divisor.detach(), **arguments)
    if form:
        grads = tuple(None if g is None else _rescaled(g, incoming, hint) for g in grads)
    first, second = (
        g if g is not None and need else t.new_empty(0)
        for g, need, t in zip(grads, needs, (call.input, call.target), strict=True)
    )
    return first, second


# ---- shapes and dtypes ---------------------------------------------------------------------------


def _fake_row_loss(
    input: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reduction, dtype = rest[5], rest[-1]
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
        input.new_empty((2 if has_index else 3, items), dtype=compute),
        input.new_empty((), dtype=torch.float64),
        input.new_empty((1,), dtype=torch.int64),
    )


def _fake_row_loss_backward(incoming: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


def _fake_pointwise_loss(
    input: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    reduction, dtype = rest[4], rest[-1]
    loss = torch.empty_like(input, dtype=dtype) if reduction == "none" else None
    return (
        input.new_empty((), dtype=dtype) if loss is None else loss,
        input.new_empty((), dtype=torch.float64),
        input.new_empty((1,), dtype=torch.int64),
    )


def _fake_pointwise_loss_backward(
    incoming: Tensor, input: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    need_input, need_target = rest[-2:]
    return (
        torch.empty_like(input) if need_input else input.new_empty(0),
        torch.empty_like(target) if need_target else target.new_empty(0),
    )


# ---- registration --------------------------------------------------------------------------------


def _each(operator: Callable[..., Any], *forms: int) -> Callable[..., Any]:
    """The vmap rule: one call an element, so that each has the bits of a call of its own.

    ``forms``: positions of the arguments that ask for a gradient in forward; a token would be lost
    when the elements are stacked.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        def element(value: Any, dim: int | None, i: int) -> Any:
            if dim is None:
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
    "pointwise_loss": (_pointwise_loss, _fake_pointwise_loss, (8, 9)),
    "pointwise_loss_backward": (_pointwise_loss_backward, _fake_pointwise_loss_backward, ()),
}

for _name, (_kernel, _fake, _forms) in _KERNELS.items():
    _tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(_name + _SCHEMAS[_name], tags=_tags)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _of_plain(_kernel), _key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mbkern::{_name}", _fake, lib=LIBRARY)
    _operator = getattr(torch.ops.mbkern, _name).default
    torch.library.register_vmap(f"mbkern::{_name}", _each(_operator, *_forms), lib=LIBRARY)

row_loss = torch.ops.mbkern.row_loss.default
row_loss_backward = torch.ops.mbkern.row_loss_backward.default
pointwise_loss = torch.ops.mbkern.pointwise_loss.default
pointwise_loss_backward = torch.ops.mbkern.pointwise_loss_backward.default
