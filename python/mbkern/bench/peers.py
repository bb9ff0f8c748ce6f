"""Other libraries' losses, each called as its documentation has it; all of them may be absent.

A peer is a function of plain tensors that returns the mean loss, to be differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

LIGER, LIGER_FP32 = "Liger", "Liger, fp32 sums"
QUACK, APEX, CUT = "quack", "apex", "cut-cross-entropy"
TRANSFORMER_ENGINE = "TransformerEngine"

Function = Callable[..., Tensor]


class Absent(Exception):
    """A way that cannot be taken here, and why."""


def load(module: str, name: str) -> Any:
    """A function of a library; Absent if it cannot be imported."""
    package = module.split(".", maxsplit=1)[0]
    if find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a library that is broken here must not stop the others
        raise Absent(f"{type(error).__name__}: {error}") from error


def _liger() -> Function:
    function: Function = load("liger_kernel.transformers.functional", "liger_cross_entropy")
    return function


def _quack() -> Function:
    function = load("quack.cross_entropy", "cross_entropy")
    return partial(function, reduction="mean", inplace_backward=True)


def _apex() -> Function:
    function = load("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")
    no_padding = -100

    def loss(x: Tensor, target: Tensor) -> Tensor:
        half = x.dtype is not torch.float32
        mean: Tensor = function.apply(x, target, 0.0, no_padding, half).mean()
        return mean

    return loss


def _transformer_engine() -> Function:
    function = load("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")

    def loss(x: Tensor, target: Tensor) -> Tensor:
        mean: Tensor = function(x[None], target[None]).mean()
        return mean

    return loss


def _liger_head(**options: Any) -> Function:
    module = "liger_kernel.transformers.functional"
    return partial(load(module, "liger_fused_linear_cross_entropy"), **options)


def _quack_head() -> Function:
    function: Function = load("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return function


def _cut_head() -> Function:
    function: Function = load("cut_cross_entropy", "linear_cross_entropy")
    return function


#: cross_entropy(logits, target)
LOSSES: Mapping[str, Callable[[], Function]] = {
    LIGER: _liger,
    QUACK: _quack,
    APEX: _apex,
    TRANSFORMER_ENGINE: _transformer_engine,
}
#: linear_cross_entropy(hidden, weight, target)
HEADS: Mapping[str, Callable[[], Function]] = {
    LIGER: _liger_head,
    LIGER_FP32: partial(_liger_head, accum_dtype=torch.float32),
    QUACK: _quack_head,
    CUT: _cut_head,
}


def found(
    peers: Mapping[str, Callable[[], Function]], device: str
) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers that can be called on this device, and why the others cannot."""
    functions: dict[str, Function] = {}
    reasons: dict[str, str] = {}
    for name, make in peers.items():
        try:
            function = make()
        except Absent as absent:
            reasons[name] = str(absent)
            continue
        if device == "cpu":
            reasons[name] = "needs a GPU"
        else:
            functions[name] = function
    return functions, reasons
