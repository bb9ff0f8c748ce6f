"""What the fused head is asked for, checked before any address is taken."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbkern._arguments import (
    Number,
    check_index,
    check_reduction,
    check_row_options,
    result_dtype,
)
from mbkern._launch import RowOptions
from mbkern._linear_rows import LinearOptions
from mbkern._losses import as_number
from mbkern._tensors import INDEX_TYPES, describe, require_one_device

_NUMBERS = (Tensor, float, int, torch.SymFloat, torch.SymInt)


def head_dtypes(
    input: Tensor, weight: Tensor, target: Tensor, loss_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """What the products are computed in, and the result's: torch's, of logits and probabilities.

    All is computed in float64 where class probabilities are.
    """
    dtype = promoted = _product_dtype(input, weight)
    if target.is_floating_point():
        promoted = torch.promote_types(dtype, target.dtype)
        dtype = promoted if promoted is torch.float64 else dtype
    return dtype, result_dtype(loss_dtype, promoted, input)


def _product_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it would cast, else the operands' own, which must be one."""
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and input.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    if input.dtype is not weight.dtype:
        raise TypeError(
            f"mbkern: input is {input.dtype} and linear_weight is {weight.dtype}; they must have "
            "one dtype, except under autocast"
        )
    return input.dtype


def linear_options(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: Number | None = None,
    denominator: Number | None = None,
    shift: bool | int = False,
    split_invariant: bool = False,
    chunk_bytes: int | None = None,
    sample_weight: Tensor | None = None,
    num_valid: int | None = None,
    filter_eps: float | str | None = None,
    classes: int | None = None,
) -> LinearOptions:
    """Check everything that needs no address, and gather it. ``classes``: if not as many as
    ``linear_weight`` has, being one of several parts."""
    for name, value, optional in (
        ("input", input, False), ("linear_weight", linear_weight, False),
        ("target", target, False), ("linear_bias", linear_bias, True), ("weight", weight, True),
        ("sample_weight", sample_weight, True),
    ):  # fmt: skip
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise TypeError(f"mbkern: {name} must be a tensor, not {type(value).__name__}")
        _refuse_layout(name, value)
    _refuse_layout("logit_scale", logit_scale)
    _refuse_layout("denominator", denominator)
    check_flag(split_invariant, "split_invariant")
    check_reduction(reduction, denominator)
    check_row_options(label_smoothing, z_loss, softcap)
    if input.dim() < 1 or linear_weight.dim() < 2:
        raise ValueError(
            "mbkern: input must be (*, in_features) and linear_weight (C, in_features) or (C, d1, "
            f"..., in_features), not {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if not input.is_floating_point() or not linear_weight.is_floating_point():
        raise TypeError(
            f"mbkern: input and linear_weight must be floating, not {input.dtype} and "
            f"{linear_weight.dtype}"
        )
    features = input.shape[-1]
    classes = linear_weight.shape[0] if classes is None else classes
    batch, inner = input.shape[:-1], linear_weight.shape[1:-1]
    if linear_weight.shape[-1] != features:
        raise ValueError(
            f"mbkern: input has {features} features and linear_weight {linear_weight.shape[-1]}"
        )
    if inner and not batch:
        raise ValueError(
            f"mbkern: linear_weight of shape {tuple(linear_weight.shape)} needs a batched input, "
            f"not {tuple(input.shape)}"
        )
    if linear_bias is not None and not linear_bias.is_floating_point():
        raise TypeError(f"mbkern: linear_bias must be floating, not {linear_bias.dtype}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"mbkern: linear_bias must be {tuple(linear_weight.shape[:-1])}, not "
            f"{tuple(linear_bias.shape)}"
        )
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"mbkern: weight must have one entry for each of the {classes} classes, not shape "
            f"{tuple(weight.shape)}"
        )
    indices, probabilities = (*batch, *inner), (*batch, classes, *inner)
    if target.shape == probabilities:
        if not target.is_floating_point():
            raise TypeError(f"mbkern: class probabilities must be floating, not {target.dtype}")
        if ignore_index is not None:
            raise ValueError(
                f"mbkern: ignore_index={ignore_index} has no meaning for a target of class "
                "probabilities"
            )
        if num_valid is not None:
            raise ValueError("mbkern: num_valid goes with class indices, not with probabilities")
        if shift:
            raise ValueError("mbkern: shift goes with class indices, not with probabilities")
    elif target.shape != indices:
        raise ValueError(
            f"mbkern: target has shape {tuple(target.shape)}; it must be {indices} (class "
            f"indices) or {probabilities} (class probabilities)"
        )
    elif target.dtype not in INDEX_TYPES:
        raise TypeError(
            f"mbkern: class indices are {target.dtype}; supported are int64, int32, int16, int8 "
            "and uint8"
        )
    for name, number in (("shift", shift), ("ignore_index", ignore_index),
                         ("num_valid", num_valid), ("chunk_bytes", chunk_bytes)):  # fmt: skip
        if number is not None and not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"mbkern: {name} must be an integer, not {number!r}")
    if shift is None:
        raise TypeError("mbkern: shift must be an integer, not None")
    if isinstance(ignore_index, int):
        check_index(ignore_index, "ignore_index")
    places = int(shift)
    if places < 0 or (places and (not batch or places > batch[-1])):
        raise ValueError(
            f"mbkern: shift={shift} must be in [0, {batch[-1] if batch else 0}], the length of the "
            "last leading dimension of the input"
        )
    tensors = {"linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"mbkern: {name} is on {tensor.device}, and input on {input.device}")
    # Asked here, too: an operator of which any tensor is on the meta device computes nothing.
    require_one_device(
        input, {"logit_scale": logit_scale, "denominator": denominator},
        {"weight": weight, "sample_weight": sample_weight},
    )  # fmt: skip
    if denominator is not None and not isinstance(denominator, _NUMBERS):
        as_number(denominator, "denominator", " or a 0-dim tensor")
    factor = None
    if isinstance(logit_scale, Tensor):
        if logit_scale.dim() != 0 or not logit_scale.is_floating_point():
            raise ValueError(
                "mbkern: logit_scale must be a number or a floating 0-dim tensor, not "
                f"{describe(logit_scale)}"
            )
    elif logit_scale is not None:
        factor = as_number(logit_scale, "logit_scale", " or a floating 0-dim tensor")
        if not math.isfinite(factor):  # some BLAS do not look at it
            raise ValueError(f"mbkern: logit_scale is {factor}; it must be finite")
    if num_valid is not None and num_valid < 0:
        raise ValueError(f"mbkern: num_valid must not be negative, it is {num_valid}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"mbkern: chunk_bytes must be positive, not {chunk_bytes}")
    rows = RowOptions(
        weight, sample_weight, -100 if ignore_index is None else ignore_index, label_smoothing,
        z_loss, softcap, reduction, denominator,
    )  # fmt: skip
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(
            "mbkern: options must be a torch.nn.LinearCrossEntropyOptions, not "
            f"{type(options).__name__}"
        )
    chunk_rows = getattr(options, "batch_chunk_size", None) if chunk_bytes is None else None
    return LinearOptions(
        rows, factor, places, chunk_bytes, chunk_rows, split_invariant, num_valid,
        _filter_eps(filter_eps, input, split_invariant),
    )  # fmt: skip


def check_flag(value: object, name: str) -> None:
    """Refuse what is neither yes nor no, as the word "False"."""
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"mbkern: {name} must be True or False, not {type(value).__name__}")


def _refuse_layout(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        return
    layout = "nested" if value.is_nested else value.layout
    if layout is not torch.strided:
        raise TypeError(f"mbkern: {name} has layout {layout}; only strided tensors are supported")


def _filter_eps(eps: float | str | None, input: Tensor, split_invariant: bool) -> float:
    if eps is None:
        return 0.0
    if split_invariant:
        raise ValueError(
            "mbkern: filter_eps leaves out what is small in a chunk, which depends on the cut; it "
            "does not go with split_invariant=True"
        )
    if input.is_cuda:
        raise NotImplementedError("mbkern: filter_eps has no kernel on CUDA")
    if isinstance(eps, str) and eps == "auto":
        return torch.finfo(input.dtype).eps / 32
    if not isinstance(eps, str):
        as_number(eps, "filter_eps")
    if isinstance(eps, str) or not 0.0 <= eps < 1.0:
        raise ValueError(f"mbkern: filter_eps must be in [0, 1), 'auto' or None, not {eps!r}")
    return float(eps)
