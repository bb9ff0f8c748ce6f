"""Logits with a known answer: the inputs of the cross-entropy suites, and their check against fp64.

The logits are shifted so that the largest is 0: the loss does not change, and the bare exponential
of a softmax's terms, which is defined for numbers <= 0, can run over the same buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest error that is not called wrong, relative to the largest exact value. In bf16 torch rounds
# the log-softmax, whose values reach 16: half a unit in the last place there is 2^-5, and so is the
# relative error of a probability.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-5}


@dataclass(frozen=True)
class Case:
    """A shape (N, C, ...) and a dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        short = {"float32": "fp32", "bfloat16": "bf16"}[self.dtype_name]
        return f"{short} ({', '.join(map(str, self.shape))})"


class Problem:
    """The tensors of a case.

    Attributes:
        logits: what every way reads, a leaf that requires grad.
        plain: the same memory outside autograd; ways that work in place overwrite it.
        target: class indices.
    """

    def __init__(self, case: Case) -> None:
        random = torch.Generator().manual_seed(2)
        pristine = torch.randn(case.shape, generator=random).mul_(2)
        self.case = case
        self._pristine = pristine.sub_(pristine.max()).to(case.dtype)
        self.logits = self._pristine.clone().requires_grad_()
        self.plain = self.logits.detach()
        items = (case.shape[0], *case.shape[2:])
        self.target = torch.randint(case.columns, items, generator=random)
        exact = self._pristine.double().requires_grad_()
        loss = F.cross_entropy(exact, self.target)
        loss.backward()  # type: ignore[no-untyped-call]
        assert exact.grad is not None
        self._loss, self._gradient = loss.item(), exact.grad
        self._largest = exact.grad.abs().max().item()

    def restore(self) -> None:
        """Undo what the last run did: the logits, as the other ways saw them, and no gradient."""
        self.logits.grad = None
        self.plain.copy_(self._pristine)

    def error(self, result: tuple[Tensor, Tensor]) -> float:
        """Largest error of the gradient over the largest gradient, or of the loss over the loss."""
        loss, gradient = result
        worst = abs(loss.item() - self._loss) / abs(self._loss)
        for ours, exact in zip(gradient, self._gradient, strict=True):
            worst = worse(worst, (ours.double() - exact).abs().max().item() / self._largest)
        return worst

    def exp_error(self) -> float:
        """Largest error of ``plain`` as the exponential of the logits, whose maximum is 1."""
        worst = 0.0
        for ours, logits in zip(self.plain, self._pristine, strict=True):
            worst = worse(worst, (ours.double() - logits.double().exp()).abs().max().item())
        return worst


def worse(a: float, b: float) -> float:
    """The larger error; NaN is the worst of all."""
    return a if a >= b or a != a else b


def backward(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Any]:
    """Loss and gradient by autograd."""
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, leaf.grad
