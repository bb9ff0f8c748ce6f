"""Every other loss on a GPU, its gradient written in place, against a copy of as many bytes.

The tensors are a small problem repeated: random numbers are made on the host, and the gradient of
every repetition must be the same; that of the first is compared with fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from suites.problem import TOLERANCE, worse
from torch import Tensor

import mbkern
from gpu.ways import COPY, EAGER, IN_PLACE
from mbkern.bench.formulas import ELEMENTS, ROUGH_IN_BF16, ROWS, Formula, tensors
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Effort, Way, interleave

WITHOUT_EXP, WITH_EXP = "gpu, losses without exp", "gpu, losses with exp"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
REPEATED = 64
WIDTHS = (1000, 32_000)  # of losses of rows


class Repeated:
    """One loss over a small problem repeated many times."""

    def __init__(self, formula: Formula, shape: tuple[int, ...], dtype: torch.dtype, device: str,
                 repeated: int) -> None:  # fmt: skip
        self.formula, self.repeated = formula, repeated
        few = tensors(formula, shape, dtype, device)
        wide = [t.double() if t.is_floating_point() else t for t in few]
        x = wide[0].requires_grad_()
        loss = formula.torch(*wide)
        (self._gradient,) = torch.autograd.grad(loss, x)
        self._loss, self._largest = loss.item(), self._gradient.abs().max().item()
        self._pristine, *self.others = (
            t.repeat(repeated, *([1] * (t.dim() - 1))) for t in few
        )  # fmt: skip
        self.leaf = self._pristine.clone().requires_grad_()
        self.plain = self.leaf.detach()
        read = [self.plain, *self.others]
        self.bytes = sum(t.numel() * t.element_size() for t in [self.plain, *read])

    def restore(self) -> None:
        self.leaf.grad = None
        self.plain.copy_(self._pristine)

    def in_place(self) -> tuple[Tensor, Any]:
        return mbkern.loss_and_grad(
            self.formula.name, self.plain, *self.others, grad_out=self.plain,
            **dict(self.formula.options),
        )  # fmt: skip

    def torch(self) -> tuple[Tensor, Any]:
        loss = self.formula.torch(self.leaf, *self.others)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, self.leaf.grad

    def error(self, loss: Tensor, gradient: Tensor) -> float:
        """Of the loss and of the gradient, relative to the largest; infinite if they vary."""
        parts = gradient.view(self.repeated, *self._gradient.shape)
        if not all(torch.equal(part, parts[0]) for part in parts):
            return float("inf")
        off = (parts[0].double() * self.repeated - self._gradient).abs().max().item()
        wrong = abs(loss.double().item() - self._loss) / max(abs(self._loss), 1e-30)
        return worse(wrong, off / self._largest)


def measure(formula: Formula, shape: tuple[int, ...], dtype: torch.dtype, effort: Effort,
            device: str, repeated: int = REPEATED) -> Group:  # fmt: skip
    """A copy, torch and mbkern; the copy moves what the loss must."""
    p = Repeated(formula, shape, dtype, device, repeated)
    entries = [Entry(COPY)]
    a = torch.ones(p.bytes // 8, device=device)
    b = torch.empty_like(a)
    ways = [Way(COPY, lambda: b.copy_(a), p.restore)]
    for name, run in ((EAGER, p.torch), (IN_PLACE, p.in_place)):
        p.restore()
        try:
            error = p.error(*run())
        except RuntimeError as failure:
            if name == IN_PLACE:
                raise
            entries.append(Entry(name, note=str(failure).splitlines()[0][:100]))
            continue
        entries.append(Entry(name, error=error, correct=error <= 4 * TOLERANCE[dtype]))
        ways.append(Way(name, run, p.restore))
    for timed in interleave(ways, effort, device):
        next(e for e in entries if e.name == timed.name).take(timed)
    suite = WITH_EXP if formula.exponential else WITHOUT_EXP
    size = (shape[0] * repeated, *shape[1:])
    label = f"{formula.name} {SHORT[dtype]} {size}"
    columns = shape[1] if len(shape) > 1 else 0
    return Group(suite, label, 1, device, "ms", COPY, entries, columns,
                 str(dtype).removeprefix("torch."))  # fmt: skip


def plan(elements: int) -> list[tuple[Formula, tuple[int, ...], torch.dtype]]:
    """All losses in fp32 and bf16; ``elements`` with their repetitions."""
    found: list[tuple[Formula, tuple[int, ...], torch.dtype]] = []
    few = elements // REPEATED
    for dtype in SHORT:
        found += [
            (formula, (few,), dtype)
            for formula in ELEMENTS
            if dtype is torch.float32 or formula.name not in ROUGH_IN_BF16
        ]
        found += [
            (formula, (max(1, few // width), width), dtype) for formula in ROWS for width in WIDTHS
        ]
    return found
