"""The common ends of the public functions: checks, then a kernel, a Function or an operator."""

from __future__ import annotations

import warnings
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from mbkern import _C, _traced
from mbkern._arguments import (
    NO_CLASS,
    REDUCTIONS,
    Number,
    check_reduction,
    legacy_reduction,
    product,
    promoted_dtype,
    result_dtype,
)
from mbkern._autograd_plain import apply_plain, plain_number
from mbkern._calls import new_call
from mbkern._launch import RowCall, RowOptions
from mbkern._launch_tensors import Inputs, TensorOptions
from mbkern._losses import Loss
from mbkern._tensors import is_differentiated
from mbkern.autograd import Request, apply_row, apply_tensors


class Extras(TypedDict, total=False):
    """Keywords that every loss takes; see :mod:`mbkern.functional`."""

    sample_weight: Tensor | None
    inplace: bool
    grad_scale: Number | None
    denominator: Number | None
    loss_dtype: torch.dtype | None


_is_compiling = torch.compiler.is_compiling
_EXTRAS = frozenset(Extras.__annotations__)


def row_loss(
    loss: Loss,
    input: Tensor,
    target: Tensor,
    options: RowOptions,
    grad_scale: Number | None,
    inplace: bool,
    loss_dtype: torch.dtype | None,
) -> Tensor:
    """Compute any loss over rows of classes; the common end of the public functions."""
    check_reduction(options.reduction, options.denominator)
    try:
        mixed = target.dtype is not input.dtype and target.is_floating_point()
    except AttributeError:
        refuse_what_is_no_tensor(loss, input, target)
        raise
    if mixed:
        # Class probabilities of another dtype: as in torch, in the promotion of both, by a copy.
        if inplace:
            raise TypeError(
                f"mbkern: inplace=True needs class probabilities of the input's dtype, "
                f"{input.dtype}, not {target.dtype}"
            )
        both = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(both), target.to(both)
    loss_dtype = result_dtype(loss_dtype, input.dtype, input)
    o, subclass = options, False
    if o.weight is not None or o.sample_weight is not None or o.denominator is not None:
        _refuse_other_gradients(o.weight, o.sample_weight, o.denominator)
        subclass = _has_subclass(o)
    if subclass or _traced.is_needed(input, target):
        refuse_what_is_no_tensor(loss, input, target)
        return _traced.row_loss(loss, input, target, options, grad_scale, loss_dtype)
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        if inplace is not False and inplace is not True:
            _check_inplace(inplace)
        request = Request(loss, options, grad_scale, inplace, loss_dtype)
        result: Tensor = apply_row(input, target, request)  # type: ignore[no-untyped-call]
        return result
    value, _ = RowCall(loss.number, input, target, options).run(loss_dtype=loss_dtype)
    assert value is not None
    return value


def tensor_loss(
    loss: Loss,
    tensors: tuple[Tensor | None, ...],
    reduction: str,
    extras: Extras,
    parameters: tuple[float, ...] = (),
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
) -> Tensor:
    """Compute any element-wise loss of tensors that broadcast to one shape."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if (
        (len(tensors) == 2 or (tensors[2] is None and loss.optional))
        and weight is None
        and not extras
        and not _is_compiling()
        and forward_ad._current_level < 0
    ):
        # Most calls, for which nothing of the following has anything to do.
        check_reduction(reduction, None)
        first, second = tensors[:2]
        done = _C.plain_loss(
            plain_number(loss, reduction), first, second, loss.differentiates_all,
            REDUCTIONS[reduction], parameters,
        )  # fmt: skip
        if type(done) is tuple:
            value, grads = done
            if grads[0] is not None or grads[1] is not None:
                value = apply_plain(first, second, done, loss, reduction, parameters)  # type: ignore[no-untyped-call]
            return value  # type: ignore[no-any-return]
        if done:  # the tensors are plain, what is asked for is not
            assert first is not None
            options = TensorOptions(None, None, None, reduction, None, -100, parameters)
            dtype = result_dtype(None, first.dtype, first)
            return _compute(loss, (first, second, None), options, dtype, None, False)
    try:
        inputs = _one_shape(loss, tensors, extras.get("inplace", False))
    except (AssertionError, AttributeError, TypeError):
        filled = _of_numbers(loss, tensors)
        if filled is None:
            raise
        return tensor_loss(loss, filled, reduction, extras, parameters, weight)
    sample_weight, promoting = extras.get("sample_weight"), weight
    if loss.weight == "mean" and weight is not None:
        alone = sample_weight is None and extras.get("denominator") is None
        if alone and reduction == "mean" and weight.shape != inputs[0].shape:
            # As torch's: by the sum of the weights that were given, not of those broadcast.
            extras["denominator"] = weight.sum(dtype=torch.float64)
        try:
            weight, sample_weight = None, product(weight, sample_weight)
        except (AttributeError, TypeError):
            refuse_weights(weight=weight, sample_weight=sample_weight)
            raise
    options = TensorOptions(
        None, weight, sample_weight, reduction, extras.get("denominator"), -100, parameters
    )
    return _end(loss, inputs, options, extras, promoting)


def rows_loss(
    loss: Loss,
    tensors: tuple[Tensor, ...],
    target: Tensor | None,
    reduction: str,
    extras: Extras,
    parameters: tuple[float, ...] = (),
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    size_average: bool | None = None,
    reduce: bool | None = None,
) -> Tensor:
    """Compute any loss of rows of tensors of one shape; ``ignore_index`` None: no class is."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if _is_compiling():  # where what a number does not have may be no AttributeError
        tensors = _of_numbers(loss, tensors) or tensors
    first = tensors[0]
    try:
        for k, t in enumerate(tensors):  # zip of unequal lengths is none of torch 2.6's compiler
            if t.shape != first.shape:
                refuse_what_is_no_tensor(loss, *tensors)
                raise ValueError(
                    f"mbkern: {loss.name} needs {loss.arguments[0]} and {loss.arguments[k]} of "
                    f"one shape, not {tuple(first.shape)} and {tuple(t.shape)}"
                )
            if not t.is_floating_point() and t is not first and not t.is_complex():
                tensors = tuple(other if other is not t else t.to(first.dtype) for other in tensors)
    except AttributeError:
        filled = _of_numbers(loss, tensors)
        if filled is None:
            raise
        return rows_loss(loss, filled, target, reduction, extras, parameters, weight, ignore_index)
    options = TensorOptions(
        target, weight, extras.get("sample_weight"), reduction, extras.get("denominator"),
        NO_CLASS if ignore_index is None else ignore_index, parameters,
    )  # fmt: skip
    inputs: Inputs = (*tensors, None, None)[:3]  # type: ignore[assignment]
    return _end(loss, inputs, options, extras, weight)


def _end(
    loss: Loss, inputs: Inputs, options: TensorOptions, extras: Extras, weight: Tensor | None
) -> Tensor:
    if extras and not extras.keys() <= _EXTRAS:  # torch 2.6 compiles no issuperset
        unknown = ", ".join(repr(name) for name in extras if name not in _EXTRAS)
        raise TypeError(f"mbkern: {loss.name} has no argument {unknown}")
    o, subclass = options, False
    check_reduction(o.reduction, o.denominator)
    if o.weight is not None or o.sample_weight is not None or o.denominator is not None:
        _refuse_other_gradients(o.weight, o.sample_weight, o.denominator)
        subclass = _has_subclass(o)
    try:
        if o.target is not None and torch.is_grad_enabled() and is_differentiated(o.target):
            if not loss.compares:
                raise NotImplementedError(
                    f"mbkern: {loss.name} computes no gradient for target; detach it"
                )
            o.target = o.target.detach()
        first, second, third = inputs
        promoted = first.dtype
        if (
            third is not None
            or weight is not None
            or (second is not None and second.dtype is not promoted)
        ):
            promoted = promoted_dtype(loss, inputs, weight)
    except (AttributeError, TypeError):
        refuse_what_is_no_tensor(loss, *inputs[: loss.inputs], o.target)
        refuse_weights(weight=weight)
        raise
    loss_dtype = result_dtype(extras.get("loss_dtype"), promoted, first)
    grad_scale = extras.get("grad_scale")
    traced = subclass or _traced.is_needed(first, second, third)
    if traced or (o.target is not None and _traced.is_needed(o.target, None)):
        refuse_what_is_no_tensor(loss, *inputs[: loss.inputs], o.target)
        return _traced.tensor_loss(loss, inputs, o, grad_scale, loss_dtype)
    return _compute(loss, inputs, o, loss_dtype, grad_scale, extras.get("inplace", False))


def _compute(
    loss: Loss,
    inputs: Inputs,
    options: TensorOptions,
    loss_dtype: torch.dtype,
    grad_scale: Number | None,
    inplace: bool,
) -> Tensor:
    """The loss of plain tensors, with a node of autograd if there is something to differentiate."""
    first, second, third = inputs
    if torch.is_grad_enabled() and (
        first.requires_grad
        or (second is not None and second.requires_grad)
        or (third is not None and third.requires_grad)
    ):
        if inplace is not False and inplace is not True:
            _check_inplace(inplace)
        request = Request(loss, options, grad_scale, inplace, loss_dtype)
        result: Tensor = apply_tensors(*inputs, request)  # type: ignore[no-untyped-call]
        return result
    value, _ = new_call(loss, inputs, options).run(loss_dtype=loss_dtype)
    assert value is not None
    return value


def _one_shape(loss: Loss, tensors: tuple[Tensor | None, ...], inplace: bool) -> Inputs:
    """The inputs broadcast to one shape, those of integers in the first one's dtype; three."""
    first, second, *rest = tensors
    assert first is not None
    shape, dtype = first.shape, first.dtype
    if not rest and second is not None and second.dtype is dtype and second.shape == shape and (
        loss.differentiates_all or not second.requires_grad
    ):  # fmt: skip
        return first, second, None
    differs = False
    for t, name in zip(tensors, loss.arguments, strict=True):
        if t is None:
            if name not in loss.optional:
                refuse_what_is_no_tensor(loss, *tensors)
            continue
        differs = differs or t.shape != shape
        if name not in loss.differentiable and torch.is_grad_enabled() and is_differentiated(t):
            if not loss.compares:
                raise NotImplementedError(
                    f"mbkern: {loss.name} computes no gradient for {name}; detach it"
                )
            detached = t = t.detach()  # by its place: the input may be the same tensor
            tensors = tuple(
                other if argument != name else detached
                for other, argument in zip(tensors, loss.arguments, strict=True)
            )
        if t.dtype is not dtype and not (t.is_floating_point() or t.is_complex()):
            tensors = tuple(other if other is not t else t.to(dtype) for other in tensors)
    if differs:
        present = [t for t in tensors if t is not None]
        common = torch.broadcast_shapes(*(t.shape for t in present))  # type: ignore[no-untyped-call]
        if inplace and common != shape:
            raise ValueError(
                f"mbkern: inplace=True needs an input of the shape of the loss, {tuple(common)}, "
                f"not {tuple(shape)}"
            )
        if loss.warns and second is not None and not _is_compiling():
            _warn_of_broadcasting(first, second)
        # Not of the shape that it has: a negated view that is expanded can have no tangent.
        tensors = tuple(t if t is None or t.shape == common else t.expand(common) for t in tensors)
    return (*tensors, None, None)[:3]  # type: ignore[return-value]


def refuse_what_is_no_tensor(loss: Loss, *tensors: object) -> None:
    """Name an argument that is no tensor, if there is one; for what has gone wrong."""
    # Not zip: the Dynamo of torch 2.6 takes sequences of one length only.
    for k in range(min(len(tensors), len(loss.arguments))):
        value, name = tensors[k], loss.arguments[k]
        if not isinstance(value, Tensor) and (value is not None or name not in loss.optional):
            raise TypeError(
                f"mbkern: {loss.name}: {name} must be a tensor, not {type(value).__name__}"
            )


def refuse_weights(**weights: object) -> None:
    """Name one that is given and no tensor, if there is one; for what has gone wrong."""
    for name, value in weights.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"mbkern: {name} must be a tensor, not {type(value).__name__}")


def _of_numbers(loss: Loss, tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The tensors with numbers filled in, which torch's formula takes; None if there are none.

    Raises for what is no tensor.
    """
    first, rest, filled = tensors[0], list(tensors[1:]), False
    if loss.takes_numbers and isinstance(first, Tensor):
        for k, value in enumerate(rest):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest[k], filled = first.new_full((), float(value)).expand(first.shape), True
    refuse_what_is_no_tensor(loss, first, *rest)
    return (first, *rest) if filled else None


def _check_inplace(inplace: object) -> None:
    """Refuse what is neither yes nor no, as the word "False": the input would be written over."""
    if not isinstance(inplace, (int, np.bool_)):
        raise TypeError(f"mbkern: inplace must be True or False, not {type(inplace).__name__}")


def _warn_of_broadcasting(input: Tensor, target: Tensor) -> None:
    # In torch's words, which filters of warnings may look for. The caller is the user's.
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size "
        f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size.",
        stacklevel=5,
    )


def _refuse_other_gradients(
    weight: Tensor | None, sample_weight: Tensor | None, denominator: Number | None
) -> None:
    for value in (weight, sample_weight, denominator):
        if isinstance(value, Tensor) and torch.is_grad_enabled() and is_differentiated(value):
            raise NotImplementedError(
                "mbkern: no gradient is computed for weights and denominators; detach them, or use "
                "torch.nn.functional"
            )


def _has_subclass(o: RowOptions | TensorOptions) -> bool:
    """Whether there is one among the options, which the kernels do not take."""
    return any(
        isinstance(value, Tensor) and type(value) is not Tensor and type(value) is not Parameter
        for value in (o.weight, o.sample_weight, o.denominator)
    )
