"""The fused head without autograd: loss and gradients in one go, the weight's added in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbkern import _linear_buffers as buffers
from mbkern._arguments import Number, check_output
from mbkern._launch import new_zeros, scalar_argument
from mbkern._linear_call import Gradients, LinearCall
from mbkern._linear_options import head_dtypes, linear_options
from mbkern._loss_sum import LossSum

NAME = "linear_cross_entropy"
_ARGUMENTS = ("input", "linear_weight", "target", "linear_bias", "logit_scale")
_OPTIONS = {
    "weight", "ignore_index", "label_smoothing", "options", "z_loss", "softcap", "denominator",
    "shift", "split_invariant", "chunk_bytes", "sample_weight", "num_valid", "filter_eps",
}  # fmt: skip
_DIFFERENTIABLE = ("input", "linear_weight", "linear_bias", "logit_scale")


def arguments(tensors: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The head's tensors by name; those given by keyword are taken out of the options."""
    if len(tensors) > len(_ARGUMENTS):
        raise TypeError(f"mbkern: {NAME} takes {', '.join(_ARGUMENTS)}, not {len(tensors)} tensors")
    given = dict(zip(_ARGUMENTS, tensors, strict=False))
    for name in _ARGUMENTS[len(tensors) :]:
        if name in options:
            given[name] = options.pop(name)
        elif name in _ARGUMENTS[:3]:
            raise TypeError(f"mbkern: {NAME} takes {', '.join(_ARGUMENTS)}; {name} is missing")
    return given


def names_of(argnums: Any, given: dict[str, Any]) -> list[str]:
    """Which arguments to differentiate."""
    names = []
    for arg in argnums if isinstance(argnums, tuple) else (argnums,):
        number = type(arg) is int and arg in range(len(_ARGUMENTS))
        name = _ARGUMENTS[arg] if number else arg
        if name not in _DIFFERENTIABLE or not isinstance(given.get(name), Tensor):
            raise ValueError(
                f"mbkern: argnums {arg!r} is not a differentiable argument of {NAME} that is a "
                f"tensor here: {', '.join(_DIFFERENTIABLE)}"
            )
        names.append(name)
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"mbkern: argnums {argnums!r} must name each argument once")
    return names


def run(
    given: dict[str, Any],
    names: list[str],
    outs: dict[str, Tensor | None],
    reduction: str,
    accumulate: bool,
    scale: Number | None,
    loss_sum: LossSum | None,
    options: dict[str, Any],
) -> tuple[Tensor, list[Tensor]]:
    """Compute loss and gradients: three products, nothing kept.

    Gradients that are returned fresh have their argument's dtype. With ``accumulate``, those with
    an entry in ``outs`` are added into it: float32 (float64), others by way of a copy.
    """
    input, weight, target = given["input"], given["linear_weight"], given["target"]
    bias, logit_scale = given.get("linear_bias"), given.get("logit_scale")
    loss_dtype = options.pop("loss_dtype", None)
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise TypeError(f"mbkern: {NAME} has no option {', '.join(map(repr, sorted(unknown)))}")
    if loss_sum is not None and not isinstance(loss_sum, LossSum):
        raise TypeError(f"mbkern: loss_sum must be a LossSum, not {type(loss_sum).__name__}")
    head = linear_options(
        input, weight, target, bias, reduction=reduction, logit_scale=logit_scale, **options
    )
    dtype, loss_dtype = head_dtypes(input, weight, target, loss_dtype)
    if loss_sum is not None and dtype is torch.float64:
        raise TypeError("mbkern: loss_sum holds float32 terms exactly; float64 losses are refused")
    factor = logit_scale if isinstance(logit_scale, Tensor) else None
    for name, out in outs.items():
        if out is not None:
            others = tuple(
                t
                for kind in (given, outs, options, {"scale": scale})
                for n, t in kind.items()
                if isinstance(t, Tensor) and n != name and t is not given[name]
            )
            _check_out(out, name, given[name], accumulate, others)
    call = LinearCall(input, weight, bias, target, factor, head, dtype)
    into = Gradients()
    device = call.x.device
    sums: dict[str, buffers.Accumulation] = {}
    if "input" in names:
        into.input = call.new_input_gradient()
    for name in ("linear_weight", "linear_bias"):
        if name in names:
            destination = outs[name] if accumulate else None
            sums[name] = buffers.Accumulation(destination, given[name], call.compute)
    if "linear_weight" in names:
        into.weight = sums["linear_weight"].memory
    if "linear_bias" in names:
        into.bias = sums["linear_bias"].memory.view(-1)
    if "logit_scale" in names:
        into.scale = new_zeros((), torch.float64, device)
    loss = call.run(
        into,
        divisor=call.divisor(),
        scale=scalar_argument(scale, "scale"),
        loss_dtype=loss_dtype,
        loss_sum=None if loss_sum is None else loss_sum.state,
    )
    assert loss is not None
    fresh: dict[str, Tensor | None] = {"input": into.input, "logit_scale": into.scale}
    into.weight = into.bias = None
    fresh |= {name: s.finish() for name, s in sums.items()}
    return loss, [_deliver(given[n], fresh[n], outs[n], accumulate) for n in names]


def _check_out(
    out: Tensor, name: str, argument: Tensor, accumulate: bool, others: tuple[Tensor, ...]
) -> None:
    if accumulate and name != "input":
        buffers.check(out, argument, others)
    else:
        check_output(out, f"grad_out of {name}", argument, accumulate, others)
        if out.data_ptr() == argument.data_ptr() and out.numel():
            raise ValueError(f"mbkern: grad_out of {name} is {name} itself, which is read again")


def _deliver(
    argument: Tensor, fresh: Tensor | None, out: Tensor | None, accumulate: bool
) -> Tensor:
    """The gradient where it was asked for."""
    if fresh is None:  # added into `out` already
        assert out is not None
        return out
    if fresh.shape != argument.shape:
        fresh = fresh.view(argument.shape)
    if out is None:
        return fresh.to(argument.dtype)
    return out.add_(fresh) if accumulate else out.copy_(fresh)
