"""Tensors of a benchmark on a device, and the check of results against fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from suites.problem import TOLERANCE, worse
from torch import Tensor

PIECE = 1 << 24  # elements that are checked at a time, so that fp64 copies stay small


@dataclass(frozen=True)
class Case:
    """A loss over ``rows`` items of ``columns`` (classes, for cross-entropy) in a dtype."""

    loss: str
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        short = {"float32": "fp32", "bfloat16": "bf16"}[self.dtype_name]
        return f"{self.loss} {short} ({self.rows}, {self.columns})"


class Problem:
    """The tensors of a case.

    Attributes:
        input: what every way reads, a leaf that requires grad.
        plain: the same memory outside autograd.
        target: class indices; for element-wise losses a tensor like the input.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.tolerance = TOLERANCE[case.dtype]
        random = torch.Generator(device).manual_seed(7)
        shape = (case.rows, case.columns)
        self._pristine = torch.empty(shape, dtype=case.dtype, device=device)
        for piece in self._pieces(self._pristine):
            piece.normal_(generator=random).mul_(2)
        self.input = self._pristine.clone().requires_grad_()
        self.plain = self.input.detach()
        self.classes = case.loss == "cross_entropy"
        if self.classes:
            self.target = torch.randint(case.columns, (case.rows,), generator=random, device=device)
        else:
            self.target = torch.randn(shape, generator=random, dtype=case.dtype, device=device)
        self._exact_loss = self._loss()

    def _pieces(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(max(1, PIECE // self.case.columns))

    def restore(self) -> None:
        """The input as it was, and no gradient."""
        self.input.grad = None
        self.plain.copy_(self._pristine)

    def _exact(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Losses an item and the gradient of their mean, in fp64, of a piece."""
        x = x.double()
        if not self.classes:
            d = x - t.double()
            return d * d / 2, d / self._pristine.numel()
        log_softmax = x.log_softmax(1)
        losses = -log_softmax.gather(1, t[:, None])
        grad = log_softmax.exp_()
        grad.scatter_add_(1, t[:, None], -torch.ones_like(losses))
        return losses, grad / self.case.rows

    def _loss(self) -> float:
        items = self.case.rows if self.classes else self._pristine.numel()
        pieces = zip(self._pieces(self._pristine), self._pieces(self.target), strict=True)
        return math.fsum(self._exact(x, t)[0].sum().item() for x, t in pieces) / items

    def error(self, loss: Tensor, gradient: Tensor) -> float:
        """Largest error of the gradient over the largest gradient, or of the loss over the loss."""
        worst = worse(0.0, abs(loss.double().item() - self._exact_loss) / abs(self._exact_loss))
        error = largest = 0.0
        for x, t, g in zip(
            *map(self._pieces, (self._pristine, self.target, gradient)), strict=True
        ):
            exact = self._exact(x, t)[1]
            error = worse(error, (g.double() - exact).abs().max().item())
            largest = max(largest, exact.abs().max().item())
        return worse(worst, error / largest)
