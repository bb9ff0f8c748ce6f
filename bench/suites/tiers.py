"""Instruction sets against each other: the in-place call, one thread, in one process.

Timed: ``loss_and_grad`` in place. Not timed: choosing the instruction set, restoring the logits.
"""

from __future__ import annotations

import functools

import torch
from suite_settings import Settings, progress

from mbkern import _C
from mbkern.bench.allocator import DEFAULT
from mbkern.bench.results import Group
from mbkern.bench.timing import Way, interleave
from suites.cross_entropy import IN_PLACE, ways_of
from suites.problem import TOLERANCE, Case, Problem

STATES = (DEFAULT,)
SUITE = "tiers"
CASES = (Case((512, 32000)), Case((8192, 1000)))


def run(settings: Settings) -> list[Group]:
    """The vector tiers that this machine has, on each case."""
    torch.set_num_threads(1)
    tiers = [isa for isa in _C.isas() if isa != "scalar"] or _C.isas()
    used = _C.isa()
    groups = []
    for case in CASES:
        progress(str(case), 1)
        problem = Problem(case)
        in_place = ways_of(problem)[IN_PLACE]

        def prepare(isa: str, problem: Problem = problem) -> None:
            problem.restore()
            _C.set_isa(isa)

        ways, errors = [], {}
        for isa in tiers:
            prepare(isa)
            errors[isa] = problem.error(in_place())
            ways.append(Way(isa, in_place, functools.partial(prepare, isa)))
        entries = interleave(ways, settings.effort(3.0))
        for entry in entries:
            entry.error = errors[entry.name]
            entry.correct = entry.error <= TOLERANCE[case.dtype]
        groups.append(
            Group(
                SUITE, str(case), 1, settings.allocator, "ms", tiers[0], entries, case.columns,
                case.dtype_name,
            )
        )  # fmt: skip
    _C.set_isa(used)
    return groups
