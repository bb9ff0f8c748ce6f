"""How far the harness's samples of one kernel lie apart: ``python bench/spread.py``.

Spread is the distance of the quartiles over the median. On a machine that is shared it is that of
the machine's memory, which others use too, so here every loss is measured within the caches of
its core, on one thread, in samples of five milliseconds: what is left is the harness and the
kernel. The aim is 3 % for every row. The result is printed and written to
``bench/results/spread.json``; status 1 if a row missed the aim. It takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import mbkern
from mbkern.bench import machine, rows
from mbkern.bench.formulas import CROSS_ENTROPY, FORMULAS, ROUGH_IN_BF16, Formula, tensors
from mbkern.bench.problem import TOLERANCE, Case, Plan, Problem, dtype_of
from mbkern.bench.statistics import summarise
from mbkern.bench.timing import Way

RESULT = Path(__file__).with_name("results") / "spread.json"
AIM = 0.03
SAMPLE = 5e-3  # seconds
ELEMENTS, ROWS = (16384,), (16, 1000)
LOGITS = ((128, 1000), (2, 32000), (1024, 100))


def _build(formula: Formula, shape: tuple[int, ...], name: str) -> Callable[[Plan], Problem]:
    def build(plan: Plan) -> Problem:
        x, *others = tensors(formula, shape, dtype_of(name), plan.device)
        options = dict(formula.options)
        grad = torch.empty_like(x)
        exact = x.double().requires_grad_()
        wide = [t.double() if t.is_floating_point() else t for t in others]
        with warnings.catch_warnings():  # kl_div's mean is meant
            warnings.simplefilter("ignore")
            loss = formula.torch(exact, *wide)
        (expected,) = torch.autograd.grad(loss, exact)

        def call() -> None:
            mbkern.loss_and_grad(formula.name, x, *others, grad_out=grad, **options)

        calls = _calls_in(SAMPLE, call)

        def run() -> torch.Tensor:
            for _ in range(calls):
                call()
            return grad

        def error(got: torch.Tensor) -> float:
            return float((got - expected).abs().max() / expected.abs().max())

        way = Way("mbkern", run, check=error, calls=calls)
        return Problem([way], TOLERANCE[dtype_of(name)], baseline="mbkern")

    return build


def _calls_in(seconds: float, call: Callable[[], None]) -> int:
    """How many calls take that long."""
    for _ in range(3):
        call()
    begin = time.perf_counter()
    for _ in range(10):
        call()
    return max(1, round(seconds * 10 / (time.perf_counter() - begin)))


def cases(plan: Plan) -> list[Case]:
    """Every loss; in fp32 and bf16."""
    return [
        Case("cached", f"{formula.name} {shape}", shape, name, _build(formula, shape, name))
        for formula in FORMULAS.values()
        for shape in _shapes(formula)
        for name in ("float32", "bfloat16")
        if name == "float32" or formula.name not in ROUGH_IN_BF16
    ]


def _shapes(formula: Formula) -> tuple[tuple[int, ...], ...]:
    if formula is CROSS_ENTROPY:
        return LOGITS
    return (ELEMENTS if formula.loss.kind == "pointwise" else ROWS,)


SUITES = {"cached": cases}


def measure() -> list[rows.Row]:
    """The suite, by the harness, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "rows.jsonl"
        command = [
            sys.executable, "-m", "mbkern", "bench", "cached", "--suite-file", __file__,
            "--threads", "1", "--allocators", "recycled", "--output", str(output),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [row for row in rows.load(output)[0] if row.status == rows.MEASURED]


def main(argv: Sequence[str]) -> int:
    """Measure, print from the widest to the narrowest, write."""
    parser = argparse.ArgumentParser(prog="bench/spread.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    args = parser.parse_args(argv)
    spreads = {f"{r.case} {r.dtype}": summarise(r.samples_s).spread for r in measure()}
    in_order = sorted(spreads, key=lambda case: -spreads[case])
    for case in in_order:
        print(f"{spreads[case]:7.2%}  {case}")
    missed = sum(spread > AIM for spread in spreads.values())
    median = statistics.median(spreads.values())
    print(f"median {median:.2%}; {missed} of {len(spreads)} rows above {AIM:.0%}")
    result = {
        "machine": machine.describe(),
        "aim": AIM,
        "median": round(median, 4),
        "rows above the aim": f"{missed} of {len(spreads)}",
        "spread": {case: round(spreads[case], 4) for case in in_order},
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
