"""Loss and gradient in one call, without autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mbkern import _linear_imperative
from mbkern._arguments import (
    NO_CLASS,
    Number,
    check_output,
    check_reduction,
    compute_dtype,
    product,
    promoted_dtype,
    result_dtype,
    tensor_of_array,
)
from mbkern._calls import new_call
from mbkern._launch import (
    RowCall,
    RowOptions,
    bump_version,
    new_gradient,
    scalar_argument,
    zeros_like,
)
from mbkern._launch_tensors import Inputs, TensorCall, TensorOptions
from mbkern._loss_asked import asked_loss, asked_reduction
from mbkern._loss_sum import LossSum
from mbkern._losses import Loss
from mbkern._tensors import describe, refuse_tracing
from mbkern.autograd import gradient_of_probabilities

Array: TypeAlias = "Tensor | np.ndarray[Any, Any]"
ArgNums: TypeAlias = "int | str | tuple[int | str, ...]"


def loss_and_grad(
    name: str,
    *tensors: Array,
    argnums: ArgNums = 0,
    reduction: str = "mean",
    grad_out: Any = None,
    accumulate: bool = False,
    scale: Number | None = None,
    loss_sum: LossSum | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Compute a loss and its gradient in one pass, without autograd.

    Args:
        name: of a loss of ``mbkern.losses()``. For ``"linear_cross_entropy"``, the fused head,
            ``argnums`` are of input, linear_weight, target, linear_bias and logit_scale; the
            weight's and the bias's gradients are added into ``grad_out`` in place, and fresh
            gradients have their argument's dtype, also with ``accumulate``.
        tensors: the loss's tensors (``mbkern.losses()`` names them; by name, too), all of the
            loss's shape, or NumPy arrays (used in place; results are arrays then).
        argnums: which arguments to differentiate: an index or a name, or a tuple of them. The
            target of cross_entropy is one if it holds class probabilities.
        reduction: "none" (losses an item, and the gradient of their sum), "mean" or "sum"; of
            ``kl_div`` also torch's "batchmean".
        grad_out: where the gradients go, in the structure of ``argnums``; None, there or within,
            is a fresh tensor. May be the input itself: the gradient is then written over it.
        accumulate: add to what is in ``grad_out`` (float32 buffers for float32, bfloat16 and
            float16 input; float64 for float64). Fresh gradients are returned for entries that are
            None.
        scale: number or 0-dim tensor that multiplies the gradient, never the loss, before its
            rounding.
        loss_sum: receives every item's term before any division; not for float64.
        options: the loss's other options: ``weight``, ``sample_weight``, ``denominator``,
            ``loss_dtype``, its own parameters (``delta``, ``margin``, ...), ``ignore_index`` where
            its function has it, and for cross_entropy ``label_smoothing``, ``z_loss``, ``softcap``;
            for the head those of its function but ``grad_scale``, ``accumulate_into``,
            ``return_stats`` and ``process_group``.

    Returns:
        The loss (0-dim, or one an item), and the gradient or the tuple of gradients.

    Raises:
        ValueError: an unknown loss or argument to differentiate, shapes that differ, the value of
            an option.
        TypeError: an unsuited dtype, what is no tensor, or no name, an option that the loss does
            not have.
        IndexError: a class index out of range, on the CPU.
        RuntimeError: an argument requires grad, outside ``torch.no_grad()``; a tracer, a transform.
        Nothing has been written then.
    """
    if isinstance(name, str) and name == _linear_imperative.NAME:
        return _linear(tensors, argnums, reduction, grad_out, accumulate, scale, loss_sum, options)
    loss = asked_loss(name, options)
    given = _arguments(loss, tensors, options)
    numpy = isinstance(given[0], np.ndarray)
    _refuse_bfloat16(numpy, options)
    inputs = tuple(
        [
            value if value is None or isinstance(value, Tensor) else _tensor(value, argument)
            for value, argument in zip(given, loss.arguments, strict=True)
        ]
    )
    positions = _positions(loss, argnums, inputs)
    outs = _structure(grad_out, argnums, positions)
    reduction = asked_reduction(loss, reduction, inputs[0], options)
    check_reduction(reduction, options.get("denominator"))
    for option, value in options.items():
        if isinstance(value, np.ndarray):
            options[option] = _tensor(value, option)
    _refuse_autograd(*inputs, *outs.values(), *options.values(), scale)
    given_inputs, given_outs = inputs, outs
    if loss.flattens:
        inputs, outs = _flat(inputs, outs)
    run = _row if loss.kind == "row" else _tensors
    value, grads = run(
        loss, inputs, positions, outs, reduction, accumulate, scale, loss_sum, options
    )
    if loss.flattens:
        grads = {p: _or_view(given_outs[p], g, given_inputs[p]) for p, g in grads.items()}
    result: Any = tuple([grads[p] for p in positions])
    if numpy:
        value, result = _array(value), tuple(_array(g) for g in result)
    return value, (result if isinstance(argnums, tuple) else result[0])


def _flat(
    inputs: tuple[Tensor | None, ...], outs: Mapping[int, Tensor | None]
) -> tuple[tuple[Tensor | None, ...], dict[int, Tensor | None]]:
    """All as (N, C): what is written must be a view, what is read may be a copy.

    Tensors that are not of one shape stay as they are: they are refused as such.
    """
    first = inputs[0]
    tensors = [t for t in (*inputs, *outs.values()) if t is not None]
    if first is None or first.dim() <= 2 or any(t.shape != first.shape for t in tensors):
        return inputs, dict(outs)
    shape, flat = (first.shape[0], math.prod(first.shape[1:])), dict(outs)
    for p, out in outs.items():
        if out is not None:
            try:
                flat[p] = out.view(shape)
            except RuntimeError as error:
                raise ValueError(
                    f"mbkern: grad_out is {describe(out)} with strides {out.stride()}; it must be "
                    "one that a view makes (N, C), or None"
                ) from error
    return tuple(None if t is None else t.flatten(1) for t in inputs), flat


def _or_view(given: Tensor | None, flat: Tensor, like: Tensor | None) -> Tensor:
    assert like is not None
    return flat.view(like.shape) if given is None else given


def _refuse_bfloat16(numpy: bool, options: dict[str, Any]) -> None:
    if numpy and options.get("loss_dtype") is torch.bfloat16:
        raise TypeError("mbkern: loss_dtype=torch.bfloat16 with NumPy arrays, which have no such")


def _refuse_autograd(*values: Any) -> None:
    refuse_tracing("loss_and_grad")
    if not torch.is_grad_enabled():
        return
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            raise RuntimeError(
                "mbkern: loss_and_grad computes outside autograd, and an argument requires grad; "
                "call it under torch.no_grad() or with detached tensors"
            )


def _linear(
    tensors: tuple[Array, ...],
    argnums: ArgNums,
    reduction: str,
    grad_out: Any,
    accumulate: bool,
    scale: Number | None,
    loss_sum: LossSum | None,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """The fused head, whose arguments have shapes of their own."""
    given = _linear_imperative.arguments(tensors, options)
    numpy = isinstance(given["input"], np.ndarray)
    _refuse_bfloat16(numpy, options)
    given = {k: _tensor(v, k) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    options = {k: _tensor(v, k) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    names = _linear_imperative.names_of(argnums, given)
    outs = _structure(grad_out, argnums, list(range(len(names))))
    named = {name: outs[k] for k, name in enumerate(names)}
    _refuse_autograd(*given.values(), *outs.values(), *options.values(), scale)
    loss, grads = _linear_imperative.run(
        given, names, named, reduction, accumulate, scale, loss_sum, options
    )
    result: Any = tuple(_array(g) for g in grads) if numpy else tuple(grads)
    value = _array(loss) if numpy else loss
    return value, (result if isinstance(argnums, tuple) else result[0])


def _arguments(loss: Loss, tensors: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """The loss's tensors, by position or taken out of the options; None: an optional one."""
    names = loss.arguments
    if len(tensors) > len(names):
        raise TypeError(f"mbkern: {loss.name} takes {', '.join(names)}, not {len(tensors)} tensors")
    if len(tensors) == len(names):
        return tensors
    given = dict(zip(names, tensors, strict=False))
    for name in names[len(tensors) :]:
        if name in options:
            given[name] = options.pop(name)
        elif name not in loss.optional:
            raise TypeError(f"mbkern: {loss.name} takes {', '.join(names)}; {name} is missing")
    return tuple(given.get(name) for name in names)


def _positions(loss: Loss, argnums: ArgNums, inputs: tuple[Tensor | None, ...]) -> list[int]:
    positions = []
    names = loss.arguments
    for arg in argnums if isinstance(argnums, tuple) else (argnums,):
        name = arg if isinstance(arg, str) else names[arg] if arg in range(len(names)) else None
        of_rows = loss.kind == "row" and name in names
        if name not in loss.differentiable and not (of_rows and _hold_probabilities(*inputs)):
            raise ValueError(
                f"mbkern: argnums {arg!r} is not a differentiable argument of {loss.name}: "
                f"{', '.join(loss.differentiable)}"
                f"{', and the target if it holds class probabilities' if of_rows else ''}"
            )
        assert name is not None
        positions.append(names.index(name))
    if len(set(positions)) != len(positions) or not positions:
        raise ValueError(f"mbkern: argnums {argnums!r} must name each argument once")
    return positions


def _hold_probabilities(input: Tensor | None, target: Tensor | None) -> bool:
    return (
        input is not None
        and target is not None
        and target.is_floating_point()
        and target.shape == input.shape
    )


def _structure(grad_out: Any, argnums: ArgNums, positions: list[int]) -> dict[int, Tensor | None]:
    if grad_out is None:
        return dict.fromkeys(positions)
    outs = grad_out if isinstance(argnums, tuple) else (grad_out,)
    if not isinstance(outs, (tuple, list)) or len(outs) != len(positions):
        raise ValueError(f"mbkern: grad_out must have the structure of argnums={argnums!r}")
    return {
        p: None if out is None else _tensor(out, "grad_out")
        for p, out in zip(positions, outs, strict=True)
    }


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        if name == "grad_out" and not value.flags.writeable:
            raise ValueError(f"mbkern: grad_out is a read-only array of shape {value.shape}")
        return tensor_of_array(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"mbkern: {name} must be a tensor or a NumPy array, not {type(value).__name__}"
        )
    return value


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _check_output(
    call: RowCall | TensorCall,
    out: Tensor,
    tensor: Tensor,
    accumulate: bool,
    others: tuple[Any, ...],
) -> None:
    try:
        check_output(out, "grad_out", tensor, accumulate, others)
        return
    except Exception as error:
        wrong = error
    call.explain()  # what is wrong with the loss itself comes first
    raise wrong


def _outputs(
    call: RowCall | TensorCall,
    tensors: tuple[Tensor | None, ...],
    positions: list[int],
    outs: Mapping[int, Tensor | None],
    accumulate: bool,
    others: tuple[Any, ...],
) -> dict[int, Tensor]:
    """The memory of each gradient: the caller's, checked, or fresh."""
    grads: dict[int, Tensor] = {}
    for p in positions:
        out, tensor = outs[p], tensors[p]
        assert tensor is not None
        if out is not None:
            rest = (*tensors[:p], *tensors[p + 1 :], *grads.values(), *others)
            _check_output(call, out, tensor, accumulate, rest)
            grads[p] = out
        elif accumulate:
            grads[p] = zeros_like(tensor, compute_dtype(tensor.dtype))
        else:
            grads[p] = new_gradient(tensor)
    return grads


def _mark_written(outs: Mapping[int, Tensor | None], tensors: tuple[Tensor | None, ...]) -> None:
    """Let autograd miss what it has saved: the kernels wrote, not torch."""
    for p, out in outs.items():
        if out is None:
            continue
        bump_version(out)
        tensor = tensors[p]
        if tensor is None or tensor is out or not out.numel():  # no elements: address 0
            continue
        # The argument itself, by another tensor, whose version may be counted apart.
        if tensor.data_ptr() == out.data_ptr():
            bump_version(tensor)


def _common(
    options: dict[str, Any], loss_sum: LossSum | None, tensors: tuple[Tensor | None, ...]
) -> Tensor | None:
    if loss_sum is None:
        return None
    if not isinstance(loss_sum, LossSum):
        raise TypeError(f"mbkern: loss_sum must be a LossSum, not {type(loss_sum).__name__}")
    if any(t is not None and t.dtype is torch.float64 for t in tensors):
        raise TypeError("mbkern: loss_sum holds float32 terms exactly; float64 losses are refused")
    return loss_sum.state


def _unknown(name: str, options: dict[str, Any]) -> None:
    if options:
        raise TypeError(f"mbkern: {name} has no option {', '.join(map(repr, options))}")


def _row(
    loss: Loss,
    tensors: tuple[Tensor | None, ...],
    positions: list[int],
    outs: Mapping[int, Tensor | None],
    reduction: str,
    accumulate: bool,
    scale: Number | None,
    loss_sum: LossSum | None,
    options: dict[str, Any],
) -> tuple[Any, dict[int, Tensor]]:
    input, target = tensors
    assert input is not None
    assert target is not None
    known = {f: options.pop(f) for f in RowOptions.__slots__ if f in options}
    promoted = promoted_dtype(loss, (input, target))
    loss_dtype = result_dtype(options.pop("loss_dtype", None), promoted, input)
    _unknown(loss.name, options)
    row = RowOptions(**known, reduction=reduction)
    state = _common(options, loss_sum, (input,))
    call = RowCall(loss.number, input, target, row)
    grads = _outputs(call, tensors, positions, outs, accumulate, (call.weight, call.sample_weight))
    factor = scalar_argument(scale, "scale")
    if 1 in grads:
        value = _row_by_target(call, grads, accumulate, factor, loss_dtype, state)
    else:
        value, _ = call.run(
            grad=grads[0],
            accumulate=accumulate,
            scale=factor,
            loss_dtype=loss_dtype,
            loss_sum=state,
        )
    _mark_written(outs, tensors)
    return value, grads


def _row_by_target(
    call: RowCall,
    grads: dict[int, Tensor],
    accumulate: bool,
    scale: float | Tensor,
    loss_dtype: torch.dtype,
    loss_sum: Tensor | None,
) -> Any:
    """The loss and the gradient by class probabilities, and that by the input if it is asked for.

    Either may be written over its argument, which the other one reads.
    """
    out = grads[1]
    state = call.new_state()
    value, divisor = call.run(state=state, loss_dtype=loss_dtype, loss_sum=loss_sum)
    incoming = torch.as_tensor(scale, dtype=torch.float64, device=out.device)
    grad = gradient_of_probabilities(call, state, incoming, divisor, out.dtype)
    if 0 in grads:
        call.run(
            grad=grads[0],
            accumulate=accumulate,
            scale=scale,
            state=state,
            from_state=True,
            divisor=divisor,
        )
    if accumulate:
        out.add_(grad)
    else:
        out.copy_(grad)
    return value


def _tensors(
    loss: Loss,
    tensors: tuple[Tensor | None, ...],
    positions: list[int],
    outs: Mapping[int, Tensor | None],
    reduction: str,
    accumulate: bool,
    scale: Number | None,
    loss_sum: LossSum | None,
    options: dict[str, Any],
) -> tuple[Any, dict[int, Tensor]]:
    input = tensors[0]
    assert input is not None
    shape = input.shape
    for name, t in zip(loss.arguments[: loss.inputs], tensors, strict=False):
        if t is not None and t.shape != shape:
            raise ValueError(
                f"mbkern: loss_and_grad needs {loss.arguments[0]} and {name} of one shape, not "
                f"{tuple(shape)} and {tuple(t.shape)}; the gradient of a broadcast argument "
                "would be a sum"
            )
    own = {name: options.pop(name) for name in loss.parameters if name in options}
    parameters = loss.numbers(**own)
    sample_weight = options.pop("sample_weight", None)
    weight = options.pop("weight", None) if loss.weight is not None else None
    promoted = promoted_dtype(loss, tensors[: loss.inputs], weight)
    if loss.weight == "mean":
        weight, sample_weight = None, product(weight, sample_weight)
    loss_dtype = result_dtype(options.pop("loss_dtype", None), promoted, input)
    denominator = options.pop("denominator", None)
    ignore_index = options.pop("ignore_index", -100) if loss.ignores else NO_CLASS
    _unknown(loss.name, options)
    state = _common(options, loss_sum, tensors[: loss.inputs])
    target = tensors[loss.inputs] if loss.inputs < len(tensors) else None
    inputs: Inputs = (*tensors[: loss.inputs], None, None)[:3]  # type: ignore[assignment]
    asked = TensorOptions(
        target, weight, sample_weight, reduction, denominator, ignore_index, parameters
    )
    call = new_call(loss, inputs, asked)
    others = (call.target, call.weight, call.sample_weight)
    grads = _outputs(call, tensors, positions, outs, accumulate, others)
    value, _ = call.run(
        grads=(grads.get(0), grads.get(1), grads.get(2)),
        accumulate=accumulate,
        scale=scalar_argument(scale, "scale"),
        loss_dtype=loss_dtype,
        loss_sum=state,
        overwrites=state is not None or any(out is not None for out in outs.values()),
    )
    _mark_written(outs, tensors)
    return value, grads
