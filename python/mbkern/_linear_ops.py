"""The fused head as registered operators, for torch.compile: chunk by chunk there, too.

``torch.ops.mbkern.linear_loss`` keeps two numbers an item, and ``linear_loss_backward`` computes
the logits once more: nothing of the logits' size is in the graph. Other tracers get the formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, library

from mbkern import _ops
from mbkern._launch import RowOptions
from mbkern._linear_call import Gradients, LinearCall
from mbkern._linear_loss import LinearRequest, as_argument, new_gradients
from mbkern._linear_rows import LinearOptions

_TENSORS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor target, "
    "Tensor? class_weight, Tensor? sample_weight"
)
_OPTIONS = (
    "str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, "
    "float? logit_scale, int shift, int? chunk_bytes, int? chunk_rows, bool split_invariant, "
    "int? num_valid, ScalarType dtype"
)
_SCHEMAS = {
    "linear_loss": (
        f"({_TENSORS}, Tensor? denominator, {_OPTIONS}, ScalarType loss_dtype) "
        "-> (Tensor loss, Tensor state, Tensor divisor)"
    ),
    "linear_loss_backward": (
        f"(Tensor incoming, {_TENSORS}, Tensor state, Tensor divisor, {_OPTIONS}, "
        "bool need_input, bool need_weight, bool need_bias, bool need_scale) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale)"
    ),
}


def _call(
    tensors: tuple[Any, ...], denominator: Tensor | None, options: tuple[Any, ...]
) -> LinearCall:
    input, weight, bias, scale, target, class_weight, sample_weight = tensors
    (
        reduction, ignore_index, smoothing, z_loss, softcap, logit_scale, shift, chunk_bytes,
        chunk_rows, split_invariant, num_valid, dtype,
    ) = options  # fmt: skip
    rows = RowOptions(
        class_weight, sample_weight, ignore_index, smoothing, z_loss, softcap or None, reduction,
        denominator,
    )  # fmt: skip
    head = LinearOptions(
        rows, logit_scale, shift, chunk_bytes, chunk_rows, split_invariant, num_valid
    )
    return LinearCall(input, weight, bias, target, scale, head, dtype)


def _items(input: Tensor, weight: Tensor, shift: int) -> list[int]:
    """The shape of the unreduced loss."""
    shape = [*input.shape[:-1], *weight.shape[1:-1]]
    if shift:
        shape[input.dim() - 2] -= shift
    return shape


def _state_size(input: Tensor, weight: Tensor, target: Tensor, shift: int) -> int:
    has_index = target.dim() == input.dim() - 1 + weight.dim() - 2
    return (2 if has_index else 3) * math.prod(_items(input, weight, shift))


def _linear_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, denominator, options, loss_dtype = args[:7], args[7], args[8:20], args[20]
    call = _call(tensors, denominator, options)
    divisor = call.divisor()
    # Of a size that is known while tracing: rows that do not count leave the end unused.
    size = _state_size(tensors[0], tensors[1], tensors[4], options[6])
    state = torch.zeros(size, dtype=call.compute, device=call.x.device)
    loss = call.run(Gradients(), divisor=divisor, state=state, loss_dtype=loss_dtype)
    assert loss is not None
    return loss, state, _ops.divisor_tensor(divisor).double()


def _linear_loss_backward(incoming: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, state, divisor, options, needs = (
        args[:7], args[7], args[8], args[9:21], args[21:],
    )  # fmt: skip
    call = _call(tensors, None, options)
    into = new_gradients(call, needs)
    if options[0] == "none":
        call.run(into, divisor=1.0, item_scale=call.of_kept(incoming), state=state, from_state=True)
    else:
        call.run(into, divisor=divisor, scale=incoming, state=state, from_state=True)
    found = (into.input, into.weight, into.bias, into.scale)
    grads = (as_argument(g, t) for g, t in zip(found, tensors, strict=False))
    # Contiguous, as the fake kernel says, whatever the layout of the argument.
    return tuple(incoming.new_empty(0) if g is None else g.contiguous() for g in grads)


def _fake_linear_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, weight, target, options = args[0], args[1], args[4], args[8:20]
    shape = _items(input, weight, options[6]) if options[0] == "none" else []
    wide = torch.float64 if options[11] is torch.float64 else torch.float32
    size = _state_size(input, weight, target, options[6])
    return (
        input.new_empty(shape, dtype=args[20]),
        input.new_empty(size, dtype=wide),
        input.new_empty((), dtype=torch.float64),
    )


def _fake_linear_loss_backward(incoming: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if need and t is not None else incoming.new_empty(0)
        for t, need in zip(args[:4], args[21:], strict=True)
    )


for _name, _kernel, _fake in (
    ("linear_loss", _linear_loss, _fake_linear_loss),
    ("linear_loss_backward", _linear_loss_backward, _fake_linear_loss_backward),
):
    _ops.register(_name, _SCHEMAS[_name], _kernel, _fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, state, divisor = output
    ctx.mark_non_differentiable(state, divisor)
    ctx.save_for_backward(*inputs[:7], state, divisor)
    ctx.options = inputs[8:20]


def _backward(ctx: Any, incoming: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = torch.ops.mbkern.linear_loss_backward(
        incoming, *ctx.saved_tensors, *ctx.options, *needs
    )
    found = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (*found, *(None,) * 17)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "mbkern: a graph with linear_loss_backward cannot be differentiated again; trace the loss, "
        "not its gradient"
    )


library.register_autograd("mbkern::linear_loss", _backward, setup_context=_setup)
library.register_autograd("mbkern::linear_loss_backward", _refuse)


def linear_loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    target: Tensor,
    request: LinearRequest,
) -> Tensor:
    """The head in a graph."""
    o, rows = request.options, request.options.row
    denominator = _ops.scalar_tensor(rows.denominator, input)
    loss: Tensor = torch.ops.mbkern.linear_loss(
        input, weight, bias, scale, target, rows.weight, rows.sample_weight, denominator,
        rows.reduction, rows.ignore_index, rows.label_smoothing, rows.z_loss, rows.softcap or 0.0,
        o.logit_scale, o.shift, o.chunk_bytes, o.chunk_rows, o.split_invariant, o.num_valid,
        request.dtype, request.loss_dtype,
    )[0]  # fmt: skip
    return loss
