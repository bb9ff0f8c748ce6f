"""Whole loss heads: the matrix product and the loss, with the gradients of both of its operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from suites.problem import TOLERANCE, backward, worse
from torch import Tensor

import mbkern
from gpu.ways import EAGER, IN_PLACE, Run
from mbkern.bench import peers
from mbkern.bench.peers import CUT, LIGER, QUACK

SUITE = "gpu, loss head"


class Head:
    """Hidden states, the matrix of classes, and targets, in bf16; logits of unit variance."""

    tolerance = TOLERANCE[torch.bfloat16]

    def __init__(self, rows: int, columns: int, width: int, device: str) -> None:
        random = torch.Generator(device).manual_seed(9)
        settings: dict[str, Any] = {"generator": random, "device": device}
        hidden = torch.randn(rows, width, **settings)
        classes = torch.randn(columns, width, **settings) / width**0.5
        self.hidden = hidden.bfloat16().requires_grad_()
        self.classes = classes.bfloat16().requires_grad_()
        self.target = torch.randint(columns, (rows,), **settings)
        x = self.hidden.detach().double().requires_grad_()
        loss, self._gradient = backward(
            F.cross_entropy(F.linear(x, self.classes.detach().double()), self.target), x
        )
        self._loss = loss.item()

    def restore(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.classes.grad = None

    def error(self, loss: Tensor, gradient: Tensor) -> float:
        """As of Problem: of the loss and of the gradient of the hidden states."""
        largest = self._gradient.abs().max().item()
        off = (gradient.double() - self._gradient).abs().max().item() / largest
        return worse(abs(loss.double().item() - self._loss) / self._loss, off)


def _whole(function: Callable[[Tensor, Tensor, Tensor], Tensor], h: Head) -> Run:
    return lambda: backward(function(h.hidden, h.classes, h.target), h.hidden)


def _eager(h: Head) -> Run:
    return _whole(lambda x, w, t: F.cross_entropy(F.linear(x, w), t), h)


def _mbkern(h: Head) -> Run:
    loss = mbkern.functional.cross_entropy
    return _whole(lambda x, w, t: loss(F.linear(x, w), t, inplace=True), h)


def _peer(name: str) -> Callable[[Head], Run]:
    return lambda h: _whole(peers.HEADS[name](), h)


WAYS = {EAGER: _eager, IN_PLACE: _mbkern, **{n: _peer(n) for n in (CUT, LIGER, QUACK)}}
