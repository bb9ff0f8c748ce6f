"""Ways to compute loss and gradient, each by a library that may be absent.

A way is a function without arguments that returns the loss and the gradient of the mean. Peers are
called as their documentation has it, with the same logits and targets; those that overwrite the
logits do so here, since the logits are restored before each run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from suites.problem import backward
from torch import Tensor

import mbkern
from gpu.problem import Problem
from mbkern.bench import peers
from mbkern.bench.peers import APEX, LIGER, QUACK

COPY = "copy"  # as many bytes as the case must move, from device memory to device memory
IN_PLACE, AUTOGRAD, ACCUMULATED = "mbkern in place", "mbkern autograd", "mbkern accumulated"
EAGER, COMPILED = "torch", "torch.compile"

Run = Callable[[], tuple[Tensor, Any]]


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


def _peer(name: str) -> Callable[[Problem], Run]:
    def make(p: Problem) -> Run:
        function = peers.LOSSES[name]()
        return lambda: backward(function(p.input, p.target), p.input)

    return make


CLASSES = {
    IN_PLACE: in_place, AUTOGRAD: autograd, EAGER: eager, COMPILED: compiled,
    **{name: _peer(name) for name in (LIGER, QUACK, APEX)},
}  # fmt: skip
ELEMENTS = {IN_PLACE: in_place, AUTOGRAD: autograd, EAGER: eager, COMPILED: compiled}
BUFFER = {ACCUMULATED: accumulated}
