"""What ``ab_check.py`` measures: a kernel in the caches, where a tenth is more than chance.

From memory the same build differs from process to process by several percent on a machine that is
shared, and only more processes help.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import mbkern
from mbkern.bench.problem import TOLERANCE, Case, Plan, Problem, dtype_of
from mbkern.bench.timing import Way

SHAPE = (128, 1000)
CALLS = 50


def _build(dtype: torch.dtype) -> Callable[[Plan], Problem]:
    def build(plan: Plan) -> Problem:
        random = torch.Generator().manual_seed(5)
        x = torch.randn(SHAPE, generator=random).to(dtype)
        target = torch.randint(SHAPE[1], SHAPE[:1], generator=random)
        grad = torch.empty_like(x)
        exact = x.double().requires_grad_()
        torch.nn.functional.cross_entropy(exact, target).backward()  # type: ignore[no-untyped-call]

        def run() -> torch.Tensor:
            for _ in range(CALLS):
                mbkern.loss_and_grad("cross_entropy", x, target, grad_out=grad)
            return grad

        def error(got: torch.Tensor) -> float:
            assert exact.grad is not None
            return float((got - exact.grad).abs().max() / exact.grad.abs().max())

        return Problem([Way("mbkern", run, check=error)], TOLERANCE[dtype], baseline="mbkern")

    return build


def cases(plan: Plan) -> list[Case]:
    """fp32 and bf16."""
    return [
        Case("cached", f"cross_entropy {SHAPE}", SHAPE, name, _build(dtype_of(name)))
        for name in ("float32", "bfloat16")
    ]


SUITES = {"cached": cases}
