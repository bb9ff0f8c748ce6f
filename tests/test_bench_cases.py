"""The benchmark measures the losses of the case list, and its baselines compute what that says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from row_case import RowCase
from row_cases import ROW_CASES

from mbkern import _C
from mbkern.bench import measure, suites
from mbkern.bench.formulas import FORMULAS, tensors
from mbkern.bench.loss_ways import loss_problem
from mbkern.bench.problem import Plan
from mbkern.bench.suites import accumulate

ALL: dict[str, Case | RowCase] = {case.name: case for case in CASES}
ALL |= {case.name: case for case in ROW_CASES if case.registered}  # others are made of these


def test_every_loss_of_the_case_list_is_measured_and_no_other() -> None:
    assert sorted(FORMULAS) == sorted(ALL)
    found, reasons = suites.of(Plan(("cross_entropy", "pointwise", "rows")))
    assert not reasons
    measured = {c.name.split()[0] for c in found if c.suite != "cross_entropy"}
    assert measured | {"cross_entropy"} == set(ALL)


def _reference(case: Case | RowCase, given: list[torch.Tensor], options: dict) -> torch.Tensor:
    named = dict(zip(FORMULAS[case.name].loss.arguments, given, strict=False))
    if isinstance(case, RowCase):
        return case.reference(**named, **options)
    input, target = (named.pop(name) for name in tuple(named)[:2])
    return case.reference(input, target, **named, **options)


@pytest.mark.parametrize("case", ALL.values(), ids=list(ALL))
@pytest.mark.filterwarnings("ignore:reduction:UserWarning")  # of torch's kl_div
def test_baselines_are_the_formulas_of_the_case_list(case: Case | RowCase) -> None:
    """In fp64, loss and gradient, at the options that mbkern is measured with."""
    formula = FORMULAS[case.name]
    shape = (7,) if formula.loss.kind == "pointwise" else (7, 5)
    x, *others = tensors(formula, shape, torch.float64)
    options = dict(formula.options)
    results = []
    for function in (
        formula.torch, formula.ours, lambda *given: _reference(case, list(given), options),
    ):  # fmt: skip
        leaf = x.clone().requires_grad_()
        value = function(leaf, *others)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for found in results[:2]:
        for a, b in zip(found, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("suite", ["linear_cross_entropy", "minibatch", "scaling", "overhead"])
def test_suites_have_cases_short_and_full(suite: str) -> None:
    plan = Plan((suite,))
    full, _ = suites.of(plan)
    short, _ = suites.of(dataclasses.replace(plan, short=True))
    assert 0 < len(short) <= len(full)


@pytest.mark.parametrize(
    ("model", "largest", "text"),
    [("gpt-2", 256, "256: 512 of 50257 classes are more than the 2^24"), ("imagenet", 8192, "")],
)
def test_a_range_that_was_cut_says_so(model: str, largest: int, text: str) -> None:
    cases, _ = suites.of(Plan(("minibatch",), model=model))
    assert max(case.size for case in cases) == largest
    for case in cases:
        assert text in case.extra.get("range", "")
        assert bool(text) == ("range" in case.extra)


def test_suites_that_this_build_has_no_functions_for_say_so() -> None:
    cases, reasons = suites.of(Plan(("accumulate", "flush")))
    there = {c.suite for c in cases}
    assert there | set(reasons) == {"accumulate", "flush"}
    assert all("has no" in reason for reason in reasons.values())


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["huber_loss", "kl_div_with_logits"])
def test_every_instruction_set_is_a_provider(name: str) -> None:
    problem = loss_problem(FORMULAS[name], (64, 130), "float32", Plan(("rows",)), tiers=True)
    ours = {way.isa for way in problem.ways if way.name.startswith("mbkern in place")}
    assert ours == set(_C.isas())
    isa = _C.isa()
    for way in problem.ways:
        way.prepare()
        result = way.run()
        assert way.check is None or way.check(result) <= problem.tolerance, way.name
    problem.close()
    assert _C.isa() == isa


@pytest.mark.cpu
@pytest.mark.parametrize(
    "suite",
    ["overhead", "accumulate", "flush", "minibatch",
     pytest.param("linear_cross_entropy", marks=pytest.mark.slow)],
)  # fmt: skip
def test_rows_say_which_instruction_set_ran(suite: str) -> None:
    plan = Plan((suite,), short=True, model="imagenet" if suite == "minibatch" else "")
    cases, reasons = suites.of(plan)
    if suite in reasons:
        pytest.skip(f"NOT CHECKED: {reasons[suite]}")
    for case in cases[-2:]:
        for row in measure.Group(case, plan, 1).finish():
            bound = row.provider.rpartition("(")[2].removesuffix(")")
            ours = bound if bound in _C.isas() else _C.isa()
            assert row.isa == (ours if row.provider.startswith("mbkern") else ""), row.provider


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy", "huber_loss"])
def test_torch_compile_is_a_provider(name: str) -> None:
    plan = Plan(("rows",), compile=True)
    problem = loss_problem(FORMULAS[name], (64, 130), "float32", plan, compiled=True)
    (way,) = [w for w in problem.ways if w.name == "torch.compile"]
    assert way.check is not None
    for _ in range(2):
        way.prepare()
        assert way.check(way.run()) <= problem.tolerance


def test_accumulation_and_flush_run_on_every_instruction_set() -> None:
    plan = Plan(short=True)
    used = _C.isa()
    for cases in (accumulate.accumulate(plan), accumulate.flush(plan)):
        problem = cases[0].build(plan)
        ours = {way.isa: way for way in problem.ways if way.name.startswith("mbkern")}
        assert set(ours) == {"", *(isa for isa in _C.isas() if isa != used)}
        for way in ours.values():
            assert way.prepare is not None
            assert way.check is not None
            way.prepare()
            assert way.check(way.run()) <= problem.tolerance
            assert _C.isa() == used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y = 1", "has no SUITES, a dict of functions by name"),
        ("SUITES = [1]", "has no SUITES, a dict of functions by name"),
        ("SUITES = {'mine': 3}", "has no SUITES, a dict of functions by name"),
        (
            "SUITES = {'mine': lambda plan: None}",
            "suite mine must return a list of Cases, not None",
        ),
        ("SUITES = {'mine': lambda plan: [3]}", "suite mine must return a list of Cases, not [3]"),
    ],
)
def test_a_suite_file_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    """The messages were Python's, of code that is not the user's."""
    file = tmp_path / "suites.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        suites.of(Plan(("mine",), suite_file=str(file)))
