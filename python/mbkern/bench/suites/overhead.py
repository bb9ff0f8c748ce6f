"""What a call costs before and after its arithmetic: 32 items of 10 classes, in blocks of calls.

Timed: the calls, and with a backward also dropping the last gradient, alike for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import mbkern
from mbkern.bench.formulas import CROSS_ENTROPY, FORMULAS, Formula, Function
from mbkern.bench.loss_ways import AUTOGRAD, TORCH, LossProblem
from mbkern.bench.problem import TOLERANCE, Case, Plan, Problem
from mbkern.bench.timing import Way

SUITE = "overhead"
SHAPE = (32, 10)
CALLS = 50
DIRECT = "mbkern loss_and_grad"


def _forward(function: Function, p: LossProblem) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            for _ in range(CALLS):
                loss = function(p.leaf, *p.others)
        return loss

    return run


def _both(function: Function, p: LossProblem) -> Callable[[], Any]:
    def run() -> Any:
        for _ in range(CALLS):
            p.leaf.grad = None
            loss = function(p.leaf, *p.others)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss, p.leaf.grad

    return run


def _direct(p: LossProblem) -> Callable[[], Any]:
    name = p.formula.name

    def run() -> Any:
        for _ in range(CALLS):
            result = mbkern.loss_and_grad(name, p.plain, *p.others)
        return result

    return run


def _problem(formula: Formula, direction: str, plan: Plan) -> Problem:
    p = LossProblem(formula, SHAPE, "float32", plan)
    make = _forward if direction == "forward" else _both

    def check(result: Any) -> float:
        return p.error(result, None) if direction == "forward" else p.error(*result)

    runs = {TORCH: make(formula.torch, p), AUTOGRAD: make(formula.ours, p)}
    if direction == "both":
        runs[DIRECT] = _direct(p)
    ways = [
        Way(name, run, check=check, calls=CALLS, direction=direction) for name, run in runs.items()
    ]
    return Problem(ways, TOLERANCE[torch.float32])


def cases(plan: Plan) -> list[Case]:
    """A loss of rows and one of elements, forward without a graph and with backward."""
    formulas = (CROSS_ENTROPY, FORMULAS["mse_loss"])
    return [
        Case(
            SUITE, f"{f.name} {SHAPE}", SHAPE, "float32", partial(_problem, f, direction),
            SHAPE[0] * SHAPE[1], direction=direction,
        )
        for f in formulas
        for direction in ("forward", "both")
    ]  # fmt: skip
