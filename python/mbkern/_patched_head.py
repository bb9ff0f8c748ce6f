"""Which calls of torch's fused head mbkern computes exactly. See ``_patched_calls``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbkern._tensors import DTYPES


def refusal(
    original: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any],
    of_tensor: Callable[[Any, str], str | None],
) -> str | None:  # fmt: skip
    """Say why torch computes this call; None if mbkern computes exactly it.

    ``of_tensor`` says why no pointer may be taken of a tensor.
    """
    try:
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
    except TypeError:
        return "arguments of no loss"
    input, weight, target = bound["input"], bound["linear_weight"], bound["target"]
    bias, of_class = bound.get("linear_bias"), bound.get("weight")
    for tensor, name in (
        (input, "input"), (weight, "linear_weight"), (target, "target"), (bias, "linear_bias"),
        (of_class, "weight"),
    ):  # fmt: skip
        if tensor is not None:
            reason = of_tensor(tensor, name)
            if reason is not None:
                return reason
            if tensor.device != input.device:
                return f"{name} is on {tensor.device}, input on {input.device}"
    if input.dtype not in DTYPES or weight.dtype is not input.dtype:
        return f"input is {input.dtype}, linear_weight {weight.dtype}"
    if not 1 <= input.dim() <= 2:
        return f"input has {input.dim()} dimensions"
    if bias is not None and bias.dtype is not input.dtype:
        return f"linear_bias is {bias.dtype}"
    if target.is_floating_point():
        if target.requires_grad or target.dtype is not input.dtype:
            return "class probabilities that require grad, or of another dtype"
    elif target.dtype is not torch.int64:
        return f"target is {target.dtype}"
    if of_class is not None and (of_class.requires_grad or of_class.dtype is not input.dtype):
        return "weight requires grad, or is of another dtype"
    if torch.is_autocast_enabled(input.device.type):
        return "autocast, under which sums of weight gradients here have more bits"
    return None
