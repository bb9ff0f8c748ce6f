"""Ways to compute loss and gradient, each by a library that may be absent.

A way is a function without arguments that returns the loss and the gradient of the mean. Peers are
called as their documentation has it, with the same logits and targets; those that overwrite the
logits do so here, since the logits are restored before each run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from suites.problem import backward
from torch import Tensor

import mbkern
from gpu.problem import Problem

COPY = "copy"  # as many bytes as the case must move, from device memory to device memory
IN_PLACE, AUTOGRAD, ACCUMULATED = "mbkern in place", "mbkern autograd", "mbkern accumulated"
EAGER, COMPILED = "torch", "torch.compile"
LIGER, QUACK, APEX = "Liger", "quack", "apex"

Run = Callable[[], tuple[Tensor, Any]]


class Absent(Exception):
    """A way that cannot be taken here, and why."""


def load(module: str, name: str) -> Any:
    """A function of a library; Absent if it cannot be imported."""
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a library that is broken here must not stop the others
        raise Absent(f"{type(error).__name__}: {error}") from error


def in_place(p: Problem) -> Run:
    return lambda: mbkern.loss_and_grad(p.case.loss, p.plain, p.target, grad_out=p.plain)


def accumulated(p: Problem) -> Run:
    buffer = torch.zeros_like(p.plain, dtype=torch.float32)

    def run() -> tuple[Tensor, Any]:
        return mbkern.loss_and_grad(
            p.case.loss, p.plain, p.target, grad_out=buffer, accumulate=True
        )

    return run


def autograd(p: Problem) -> Run:
    function = getattr(mbkern.functional, p.case.loss)
    return lambda: backward(function(p.input, p.target), p.input)


def _torch(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    if p.classes:
        return F.cross_entropy
    return lambda x, t: F.mse_loss(x, t) / 2


def eager(p: Problem) -> Run:
    function = _torch(p)
    return lambda: backward(function(p.input, p.target), p.input)


def compiled(p: Problem) -> Run:
    torch._dynamo.reset()
    function = torch.compile(_torch(p), dynamic=False)
    return lambda: backward(function(p.input, p.target), p.input)


def liger(p: Problem) -> Run:
    function = load("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda: backward(function(p.input, p.target), p.input)


def quack(p: Problem) -> Run:
    function = load("quack.cross_entropy", "cross_entropy")
    return lambda: backward(
        function(p.input, p.target, reduction="mean", inplace_backward=True), p.input
    )


def apex(p: Problem) -> Run:
    function = load("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")
    half = p.case.dtype is not torch.float32
    no_padding = -100
    return lambda: backward(
        function.apply(p.input, p.target, 0.0, no_padding, half).mean(), p.input
    )


CLASSES = {
    IN_PLACE: in_place, AUTOGRAD: autograd, EAGER: eager, COMPILED: compiled,
    LIGER: liger, QUACK: quack, APEX: apex,
}  # fmt: skip
ELEMENTS = {IN_PLACE: in_place, AUTOGRAD: autograd, EAGER: eager, COMPILED: compiled}
BUFFER = {ACCUMULATED: accumulated}
