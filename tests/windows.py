"""Mini-batches to cut into windows of micro-batches, and a small model for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbkern import GradAccumulator

CUTS = ([23], [1] * 23, [9, 6, 4, 4], [20, 3], [2, 21])
MODES = ("deferred", "streaming", "known")


def model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


class Problem:
    """A mini-batch of 23 samples of 7 positions, its loss as a sum, and the count of that sum."""

    def __init__(self, kind: str) -> None:
        random = torch.Generator().manual_seed(1)
        self.kind = kind
        self.x = torch.randn(23, 7, 6, generator=random, dtype=torch.float64)
        self.target = torch.randint(5, (23, 7), generator=random)
        self.weight = torch.rand(23, generator=random, dtype=torch.float64)
        if kind == "padding":
            lengths = torch.randint(0, 8, (23,), generator=random)
            self.target[torch.arange(7)[None] >= lengths[:, None]] = -100
            self.target[3:5] = -100  # a micro-batch without a token
        elif kind == "packed":
            self.target[torch.rand(23, 7, generator=random) < 0.2] = -100

    def loss(self, net: nn.Module, rows: slice) -> tuple[Tensor, Tensor]:
        out, target = net(self.x[rows].to(next(net.parameters()).dtype)), self.target[rows]
        if self.kind == "classes":
            out, target = out.mean(1), target[:, 0]
            return F.cross_entropy(out, target, reduction="sum"), torch.tensor(len(target))
        if self.kind == "weighted":
            per_item = F.cross_entropy(out.mean(1), target[:, 0], reduction="none")
            w = self.weight[rows].to(per_item.dtype)
            return (w * per_item).sum(), w.sum()
        loss = F.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="sum")
        return loss, (target != -100).sum()

    def parts(self, cut: list[int]) -> Iterator[slice]:
        begin = 0
        for size in cut:
            yield slice(begin, begin + size)
            begin += size

    def full(self, net: nn.Module) -> list[Tensor]:
        loss, count = self.loss(net, slice(None))
        return list(torch.autograd.grad(loss / count, list(net.parameters())))


def run(acc: GradAccumulator, net: nn.Module, problem: Problem, cut: list[int]) -> None:
    if acc.mode == "known":
        acc.begin(problem.loss(net, slice(None))[1])
    for rows in problem.parts(cut):
        loss, count = problem.loss(net, rows)
        acc.backward(loss, count=count)


class Failing(torch.autograd.Function):
    """Its backward raises a KeyError."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("planted")
