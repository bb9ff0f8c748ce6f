"""The suites: each a function of a plan that returns its cases."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mbkern.bench.problem import Case, Plan
from mbkern.bench.suites import (
    accumulate,
    cross_entropy,
    family,
    head,
    minibatch,
    overhead,
    scaling,
)  # fmt: skip

Suite = Callable[[Plan], list[Case]]


SUITES: Mapping[str, Suite] = {
    "cross_entropy": cross_entropy.cases,
    "pointwise": family.pointwise,
    "rows": family.rows,
    "linear_cross_entropy": head.cases,
    "accumulate": accumulate.accumulate,
    "flush": accumulate.flush,
    "overhead": overhead.cases,
    "minibatch": minibatch.cases,
    "scaling": scaling.cases,
}


def of(plan: Plan) -> tuple[list[Case], dict[str, str]]:
    """The cases of a plan in order, and why suites of it have none."""
    suites = dict(SUITES)
    if plan.suite_file:
        suites |= _from_file(Path(plan.suite_file))
    cases: list[Case] = []
    reasons: dict[str, str] = {}
    for name in plan.suites:
        if name not in suites:
            raise ValueError(f"mbkern bench: unknown suite {name!r}; there are {', '.join(suites)}")
        try:
            made = suites[name](plan)
            found = list(made) if isinstance(made, Iterable) else [made]
        except LookupError as unavailable:
            if type(unavailable) is not LookupError:  # a KeyError is a mistake, and no reason
                raise
            reasons[name] = str(unavailable.args[0])
            continue
        if not all(isinstance(case, Case) for case in found):
            raise ValueError(
                f"mbkern bench: suite {name} must return a list of Cases, not {made!r}"
            )
        cases += found
    wanted = [c for c in cases if not plan.directions or c.direction in plan.directions]
    return wanted, reasons


def _from_file(path: Path) -> dict[str, Suite]:
    """The public functions of a Python file: SUITES in it, by name."""
    spec = importlib.util.spec_from_file_location("mbkern_bench_suite_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"mbkern bench: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    suites = getattr(module, "SUITES", None)
    if not isinstance(suites, Mapping) or not all(callable(suite) for suite in suites.values()):
        raise ValueError(f"mbkern bench: {path} has no SUITES, a dict of functions by name")
    return dict(suites)
