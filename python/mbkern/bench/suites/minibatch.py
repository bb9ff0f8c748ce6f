"""Time a sample against the micro-batch: function evaluations and gradient evaluations.

How many samples are computed at once is a choice of memory and speed; how many are averaged into a
gradient is another. Beside each time stands what the cut costs in exactness: the same logits are
cut into micro-batches of that size, and what differs from the uncut result is counted, in bits for
the gradient, and against fp64 for the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mbkern
from mbkern.bench.formulas import FORMULAS, Formula, Function, tensors
from mbkern.bench.loss_ways import AUTOGRAD, TORCH, LossProblem
from mbkern.bench.models import GPT2, find
from mbkern.bench.problem import TOLERANCE, Case, Plan, Problem
from mbkern.bench.timing import Way

SUITE = "minibatch"
LARGEST = 8192
FUNCTION, GRADIENT = "function", "gradient"


def cases(plan: Plan) -> list[Case]:
    """Micro-batches from 1 to 8192 (as far as 2^24 elements go on a CPU, 2^22: short)."""
    if plan.loss not in FORMULAS:
        raise LookupError(f"unknown loss {plan.loss!r}; there are {', '.join(FORMULAS)}")
    formula = FORMULAS[plan.loss]
    pointwise = formula.loss.kind == "pointwise"
    model = find(plan.model) if plan.model else GPT2
    classes = 1 if pointwise else model.classes
    budget = 1 << (30 if plan.device == "cuda" else 22 if plan.short else 24)

    def shape(size: int) -> tuple[int, ...]:
        return (size,) if pointwise else (size, classes)

    step = 2 if plan.short else 1
    sizes = [1 << power for power in range(0, LARGEST.bit_length(), step)]
    kept = [size for size in sizes if size * classes <= budget]
    end = _end(f"{formula.name} {model.name}", classes, kept, sizes, budget)
    return [
        Case(
            SUITE, f"{formula.name} {model.name} {what} {size}",
            shape(size), "float32", partial(_problem, formula, shape(size), what),
            size, "micro-batch", "forward" if what == FUNCTION else "both",
            extra={"samples": size, "series": f"{formula.name} {model.name} {what}", **end},
        )
        for size in kept
        for what in (FUNCTION, GRADIENT)
    ]  # fmt: skip


def _end(
    what: str, classes: int, kept: Sequence[int], sizes: Sequence[int], budget: int
) -> dict[str, str]:
    """Where the range was cut and why, if it was."""
    if len(kept) == len(sizes):
        return {}
    return {
        "range": f"{what} ends at micro-batches of {kept[-1]}: {sizes[len(kept)]} of {classes} "
        f"classes are more than the 2^{budget.bit_length() - 1} elements that are measured here."
    }


def _problem(formula: Formula, shape: tuple[int, ...], what: str, plan: Plan) -> Problem:
    p = LossProblem(formula, shape, "float32", plan)
    if what == FUNCTION:
        ways = [_function(TORCH, formula.torch, p), _function("mbkern", formula.ours, p)]
    else:
        ways = [
            p.through_autograd(TORCH, formula.torch, "both"),
            p.through_autograd(AUTOGRAD, formula.ours, "both"),
            p.in_place(),
        ]
        for way, found in zip(ways, differences(formula, shape, plan.device), strict=True):
            way.extra = found
    return Problem(ways, 4 * TOLERANCE[torch.float32])


def _function(name: str, function: Function, p: LossProblem) -> Way:
    def run() -> Tensor:
        with torch.no_grad():
            return function(p.plain, *p.others)

    return Way(name, run, p.restore, lambda r: p.error(r, None), direction="forward")


# ---- the same logits, cut in every way -----------------------------------------------------------


def differences(
    formula: Formula, shape: tuple[int, ...], device: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What cutting costs torch, mbkern through autograd, and mbkern in place.

    Of the mean loss and its gradient: ``bits_different``: gradient elements (and the loss) that are
    not those of the uncut batch; ``loss_error``: of the mean, relative, against fp64. Empty where
    the micro-batch is not smaller than what is cut (2^20 elements or two items).
    """
    columns = shape[1] if len(shape) > 1 else 1
    items = max(2, min(LARGEST, (1 << 20) // columns))
    size = shape[0]
    if size > items:
        return {}, {}, {}
    x, *others = tensors(formula, (items, *shape[1:]), torch.float32, device, seed=5)
    wide = [t.double() if t.is_floating_point() else t for t in (x, *others)]
    exact = formula.torch(*wide).item()
    found = []
    for evaluate in (_by_torch, _by_autograd, _in_place):
        whole_loss, whole = evaluate(formula, x, others, items)
        loss, gradient = evaluate(formula, x, others, size)
        differing = int((gradient != whole).sum()) + int(loss != whole_loss)
        error = abs(loss.double().item() - exact) / max(abs(exact), 1e-30)
        found.append({"cut_items": items, "bits_different": differing, "loss_error": error})
    return found[0], found[1], found[2]


def _pieces(x: Tensor, others: list[Tensor], size: int) -> list[list[Tensor]]:
    return [list(p) for p in zip(*(torch.split(t, size) for t in (x, *others)), strict=True)]


def _sum_of(
    call: Callable[[Tensor, list[Tensor]], Tensor], x: Tensor, others: list[Tensor], size: int
) -> tuple[Tensor, Tensor]:
    """Losses of the pieces added up as training loops do, and the gradient, by autograd."""
    leaf = x.clone().requires_grad_()
    total = torch.zeros((), device=x.device)
    for piece, *rest in _pieces(leaf, others, size):
        loss = call(piece, rest)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    assert leaf.grad is not None
    return total, leaf.grad


def _by_torch(formula: Formula, x: Tensor, others: list[Tensor], size: int) -> tuple[Tensor, ...]:
    """The mean of a micro-batch, weighed by its share: right, where loops often are not."""

    def call(piece: Tensor, rest: list[Tensor]) -> Tensor:
        return formula.torch(piece, *rest) * (len(piece) / len(x))

    return _sum_of(call, x, others, size)


def _by_autograd(
    formula: Formula, x: Tensor, others: list[Tensor], size: int
) -> tuple[Tensor, ...]:
    """The mini-batch's count as the denominator; the loss through LossSum."""
    total = mbkern.LossSum(x.device)
    function = getattr(mbkern.functional, formula.name)
    options = dict(formula.options)

    def call(piece: Tensor, rest: list[Tensor]) -> Tensor:
        losses: Tensor = function(piece, *rest, reduction="none", **options)
        total.add(losses.detach())
        loss: Tensor = function(piece, *rest, denominator=len(x), **options)
        return loss

    _, gradient = _sum_of(call, x, others, size)
    return total.value(denominator=len(x)), gradient


def _in_place(formula: Formula, x: Tensor, others: list[Tensor], size: int) -> tuple[Tensor, ...]:
    total, y = mbkern.LossSum(x.device), x.clone()
    for piece, *rest in _pieces(y, others, size):
        mbkern.loss_and_grad(
            formula.name, piece, *rest, denominator=len(x), grad_out=piece, loss_sum=total,
            **dict(formula.options),
        )  # fmt: skip
    return total.value(denominator=len(x)), y
