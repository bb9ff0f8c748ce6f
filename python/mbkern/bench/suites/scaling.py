"""How time grows with rows, with columns and with threads: expected is linear growth.

``python -m mbkern bench scaling`` fits the slope of log(time) over log(size) for every provider.
"""

from __future__ import annotations

import os
from functools import partial

from mbkern.bench.formulas import FORMULAS
from mbkern.bench.loss_ways import loss_problem
from mbkern.bench.problem import Case, Plan

SUITE = "scaling"


def cases(plan: Plan) -> list[Case]:
    """Rows at 4096 classes, classes at 256 rows, and threads at (1024, 4096)."""
    if plan.loss not in FORMULAS:
        raise LookupError(f"unknown loss {plan.loss!r}; there are {', '.join(FORMULAS)}")
    formula = FORMULAS[plan.loss]
    if formula.loss.kind == "pointwise":
        raise LookupError(f"{formula.name} has no rows")
    steps = (4, 8, 2) if plan.short else (6, 13, 1)
    ends = {"rows": (4096, steps), "classes": (256, steps)}
    found = []
    for axis, (other, (first, last, step)) in ends.items():
        for power in range(first, last + 1, step):
            size = 1 << (power if axis == "rows" else power + 3)
            shape = (size, other) if axis == "rows" else (other, size)
            found.append(_case(formula.name, axis, shape, size))
    cpus = len(os.sched_getaffinity(0))
    counts = sorted({1, *(2**k for k in range(10) if 2**k <= cpus), cpus})
    if plan.device == "cpu":
        found += [_case(formula.name, "threads", (1024, 4096), t, t) for t in counts]
    return found


def _case(
    loss: str, axis: str, shape: tuple[int, ...], size: float, threads: int | None = None
) -> Case:
    build = partial(loss_problem, FORMULAS[loss], shape, "float32", limits=axis != "rows")
    return Case(
        SUITE, f"{loss} {axis} {shape}", shape, "float32", build, size, axis, threads=threads,
        extra={"series": f"{loss} over {axis}"},
    )  # fmt: skip
