"""Checks of arguments that the entry points share; no addresses are taken here."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mbkern._losses import Loss, as_number
from mbkern._tensors import (
    INDEX_TYPES,
    byte_range,
    describe,
    has_internal_overlap,
    meets,
    on_cuda,
    require_dtype,
    require_plain,
    same_elements,
)

Number: TypeAlias = "float | int | Tensor"

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
#: An ignore_index that ignores nothing: it is no class, so it is an error in a target.
NO_CLASS = -(2**63)
_HALF = (torch.bfloat16, torch.float16)
_PATCHED = str(Path(__file__).with_name("_patched.py"))


def check_reduction(reduction: str, denominator: Number | None) -> None:
    """Refuse an unknown reduction, and a denominator that would not be used."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"mbkern: {reduction!r} is not a valid reduction: none, mean or sum")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"mbkern: denominator goes with reduction='mean', not {reduction!r}")


def promoted_dtype(
    loss: Loss, inputs: tuple[Tensor | None, ...], weight: Tensor | None = None
) -> torch.dtype:
    """Return the dtype that torch computes all in: class indices do not count."""
    first, *others = inputs[: loss.promoting]
    assert first is not None
    dtype = first.dtype
    for other in (*others, weight if loss.weight_promotes else None):
        if other is not None and other.dtype is not dtype and other.is_floating_point():
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def result_dtype(
    loss_dtype: torch.dtype | None, promoted: torch.dtype, input: Tensor
) -> torch.dtype:
    """Return the dtype asked for, or torch's: the promoted one, under autocast float32."""
    if loss_dtype is not None:
        if not isinstance(loss_dtype, torch.dtype) or loss_dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.float64,
        ):
            raise TypeError(
                f"mbkern: loss_dtype must be a floating dtype of 16 to 64 bits, not {loss_dtype}"
            )
        return loss_dtype
    if promoted in _HALF:
        device = input.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return torch.float32
    return promoted


def tensor_of_array(array: np.ndarray[Any, Any], name: str) -> Tensor:
    """Return a NumPy array's own memory as a tensor, or raise with the reason.

    A read-only array becomes a tensor like any other: it must only be read.
    """
    if isinstance(array, np.ma.MaskedArray):  # whose mask torch would not see
        raise TypeError(f"mbkern: {name} is a masked array; pass its filled(0) or its data")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"mbkern: {name} is an array {array.shape} of {array.dtype} with strides "
            f"{array.strides}: {error}"
        ) from None


def hint_value(hint: Number) -> float:
    """Return grad_scale as a number that can be divided out again, or raise."""
    if isinstance(hint, Tensor) and hint.numel() != 1:
        raise ValueError(
            f"mbkern: grad_scale must be a number or a tensor of one element, not {describe(hint)}"
        )
    value = as_number(hint, "grad_scale", " or a tensor of one element")
    if not math.isfinite(value) or value == 0.0:
        raise ValueError(f"mbkern: grad_scale must be finite and not 0, it is {value}")
    return value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that a storage type is computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def product(weight: Tensor | None, sample_weight: Tensor | None) -> Tensor | None:
    """Multiply torch's weight and ours, where both count in the mean, in 32 bits or more."""
    if weight is None or sample_weight is None:
        return weight if sample_weight is None else sample_weight
    both = compute_dtype(torch.promote_types(weight.dtype, sample_weight.dtype))
    return weight.to(both) * sample_weight.to(both).expand(weight.shape)


# Of each type, the integers that compare as its non-negative numbers do, and that of 1.
_BITS = {
    torch.float32: (torch.int32, 0x3F80_0000),
    torch.bfloat16: (torch.int16, 0x3F80),
    torch.float16: (torch.int16, 0x3C00),
    torch.float64: (torch.int64, 0x3FF0_0000_0000_0000),
}


def _bits(t: Tensor) -> tuple[Tensor, int] | None:
    """A tensor's bits as integers: torch finds their extrema in two thirds of the time."""
    if t.dtype not in _BITS or t.is_neg():
        return None
    dtype, one = _BITS[t.dtype]
    return t.detach().view(dtype), one


def _surely_probabilities(t: Tensor) -> bool:
    """Whether all are in [0, 1]; false also of -0."""
    if (found := _bits(t)) is None:
        return False
    bits, one = found
    low, high = bits.aminmax()
    return low.item() >= 0 and high.item() <= one


def _surely_not_negative(t: Tensor) -> bool:
    """Whether none is negative; false also of -0 and of a NaN with a sign."""
    found = _bits(t)
    return found is not None and found[0].amin().item() >= 0


def check_values(loss: Loss, inputs: tuple[Tensor | None, ...]) -> None:
    """Refuse values outside a loss's domain, as torch does on the CPU; on CUDA nobody looks."""
    x, y, third = inputs
    if x is None or on_cuda(x) or any(t is not None and t.numel() == 0 for t in inputs):
        return
    # aminmax is one pass without temporaries, and NaN where there is one.
    if loss.domain == "probabilities":
        for t, name in ((x, "input"), (y, "target")):
            if t is None or _surely_probabilities(t):
                continue
            low, high = (v.item() for v in t.aminmax())
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"mbkern: {loss.name} takes probabilities, in [0, 1]; {name} holds "
                    f"numbers from {low} to {high}"
                )
    if loss.domain == "variances" and third is not None and not _surely_not_negative(third):
        low = third.aminmax().min.item()
        if low != low:  # one may be negative beside the NaN
            low = third.nan_to_num(0.0).aminmax().min.item()
        if low < 0:
            raise ValueError(
                f"mbkern: {loss.name} takes variances; {loss.arguments[2]} holds {low}"
            )


def check_output(
    grad: Tensor, name: str, input: Tensor, accumulate: bool, others: tuple[Tensor | None, ...]
) -> None:
    """Refuse an output that the gradient of ``input`` cannot be written to, with the reason."""
    if require_plain(grad, name) is not grad:
        raise ValueError(f"mbkern: {name} is a negated view; it cannot be written to")
    wanted = compute_dtype(input.dtype) if accumulate else input.dtype
    if grad.shape != input.shape or grad.dtype != wanted:
        raise ValueError(
            f"mbkern: {name} must be {tuple(input.shape)} {wanted}, not {describe(grad)}"
        )
    if has_internal_overlap(grad):
        raise ValueError(
            f"mbkern: {name} has elements that share memory (shape {tuple(grad.shape)}, "
            f"strides {grad.stride()}); give it memory of its own"
        )
    start, end = byte_range(grad)
    if meets(input, start, end):
        if accumulate:
            raise ValueError(
                f"mbkern: {name} shares memory with the input, which cannot be accumulated into"
            )
        if not same_elements(grad, input):
            raise ValueError(f"mbkern: {name} overlaps the input without being the input")
    for other in others:
        if other is not None and meets(other, start, end):
            raise ValueError(f"mbkern: {name} overlaps another argument, {describe(other)}")


def check_row_shapes(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Refuse what is no input and target of a row loss, by shapes and dtypes alone."""
    shape = input.shape
    if len(shape) == 0:
        raise ValueError(
            "mbkern: input must have a class dimension: (C), (N, C) or (N, C, d1, ...), not ()"
        )
    if target.shape == shape:
        probabilities(target, input, ignore_index)
        return
    items = shape[:1] + shape[2:] if len(shape) > 1 else torch.Size(())
    if target.dtype not in INDEX_TYPES or target.shape != items:
        refuse_indices(target, shape, items, or_shares=True)


def check_row_options(label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    """Refuse a share outside [0, 1], a cap that is not positive and finite, and tensors."""
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            raise TypeError(
                f"mbkern: {name} must be a number, not a tensor, of which no gradient is computed"
            )
        if not isinstance(number, (float, torch.SymInt, torch.SymFloat)) and (
            number is not None or name != "softcap"
        ):
            as_number(number, name)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"mbkern: label_smoothing must be in [0, 1], not {label_smoothing}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"mbkern: softcap must be positive and finite, not {softcap}")


def check_index(index: object, name: str) -> None:
    """Refuse what is no integer of 64 bits."""
    try:
        value = operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"mbkern: {name} must be an integer, not {type(index).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"mbkern: {name} must have 64 bits, not {value.bit_length() + 1}")


def legacy_reduction(size_average: bool | None, reduce: bool | None, *, stacklevel: int = 4) -> str:
    """The reduction that torch's deprecated arguments mean, with its warning.

    ``stacklevel``: that of the user's line; 3 if a public function calls this itself. torch's own
    function cannot be called where a call of ours is compiled.
    """
    average, reduces = size_average is None or size_average, reduce is None or reduce
    reduction = "none" if not reduces else "mean" if average else "sum"
    if not torch.compiler.is_compiling():
        warnings.warn(
            "size_average and reduce args will be deprecated, please use "
            f"reduction='{reduction}' instead.",
            stacklevel=stacklevel,
        )
    return reduction


def warn_of_mean() -> None:
    """Torch's warning of the mean of kl_div, in its words, which filters of warnings may look for.

    For its place, too, the caller of the function, or of torch's where this one runs instead.
    """
    if torch.compiler.is_compiling():
        return
    level, frame = 3, sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == _PATCHED:
        level, frame = level + 1, frame.f_back
    warnings.warn(
        "reduction: 'mean' divides the total loss by both the batch size and the support size."
        "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
        "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
        stacklevel=level,
    )


def refuse_indices(
    target: Tensor, shape: torch.Size, wanted: torch.Size, *, or_shares: bool = False
) -> None:
    """Say why ``target`` cannot be the class indices of an input of ``shape``."""
    if target.shape != wanted:
        shares = f" or {tuple(shape)} (class probabilities)" if or_shares else ""
        raise ValueError(
            f"mbkern: target has shape {tuple(target.shape)}; for an input of {tuple(shape)} it "
            f"must be {tuple(wanted)} (class indices){shares}"
        )
    raise TypeError(
        f"mbkern: class indices are {target.dtype}; supported are int64, int32, int16, int8 and "
        "uint8"
    )


def probabilities(target: Tensor, input: Tensor, ignore_index: int) -> Tensor:
    """Return class probabilities in the input's dtype, or raise."""
    if not target.is_floating_point():
        raise TypeError(
            "mbkern: a target of the input's shape holds class probabilities and must be floating, "
            f"not {target.dtype}"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"mbkern: ignore_index={ignore_index} has no meaning for a target of class "
            "probabilities"
        )
    if target.dtype is not input.dtype:
        raise TypeError(
            f"mbkern: class probabilities are {target.dtype} and the input is {input.dtype}; "
            "they must have one dtype here"
        )
    return target


def weights_as(weight: Tensor, name: str, compute: torch.dtype) -> Tensor:
    """Return weights (of any real dtype) in the type computed in, or raise."""
    weight = require_plain(weight, name)
    if weight.is_complex() or weight.is_quantized:
        raise TypeError(f"mbkern: {name} is {weight.dtype}; weights are real numbers")
    return weight.detach().to(compute)


def class_weight(weight: Tensor, columns: int, compute: torch.dtype) -> Tensor:
    """Return the class weights in the type computed in, or raise."""
    weight = require_plain(weight, "weight")
    require_dtype(weight, "weight")
    if weight.shape != (columns,):
        raise ValueError(
            f"mbkern: weight must have one entry for each of the {columns} classes, not shape "
            f"{tuple(weight.shape)}"
        )
    return weight.detach().to(compute).contiguous()
