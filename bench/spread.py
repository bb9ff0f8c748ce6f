"""How far the harness's samples of one kernel lie apart: ``python bench/spread.py``.

Spread is the distance of the quartiles over the median. On a machine that is shared it is that of
the machine's memory, which others use too, so here every loss is measured within the caches of
its core, on one thread, in samples of five milliseconds: what is left is the harness, the kernel,
and a core whose clock and units others use as well. The last is seen by a control: samples of as
many milliseconds of ``torch.exp`` over the first cache, in the same rounds. The aim is 3 % for
every row on an idle machine, so all is measured in several passes, and each row is taken from the
pass in which its control, not the row itself, lay closest together. The result is printed and
written to ``bench/results/spread.json``; status 1 if a row missed the aim whose control did not.
Five passes take eight minutes.
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
from dataclasses import dataclass
from pathlib import Path

import torch

import mbkern
from mbkern.bench import machine, rows
from mbkern.bench.arguments import check_output, count
from mbkern.bench.formulas import CROSS_ENTROPY, FORMULAS, ROUGH_IN_BF16, Formula, tensors
from mbkern.bench.problem import TOLERANCE, Case, Plan, Problem, dtype_of
from mbkern.bench.statistics import summarise
from mbkern.bench.timing import Way

RESULT = Path(__file__).with_name("results") / "spread.json"
AIM = 0.03
SAMPLE = 5e-3  # seconds
PASSES = 5
CONTROL = "limit: exp in the first cache"
ELEMENTS, ROWS = (65536,), (64, 1000)  # three fp32 tensors are 750 KB: in a second-level cache
LOGITS = ((64, 1000), (2, 32000), (640, 100))


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
        return Problem([way, _control()], TOLERANCE[dtype_of(name)], baseline="mbkern")

    return build


def _control() -> Way:
    """Work that neither allocates nor leaves the core's first cache."""
    x, out = torch.linspace(-8, 0, 2048), torch.empty(2048)
    calls = _calls_in(SAMPLE, lambda: torch.exp(x, out=out))

    def run() -> None:
        for _ in range(calls):
            torch.exp(x, out=out)

    return Way(CONTROL, run, calls=calls, limit=True)


def _calls_in(seconds: float, call: Callable[[], object]) -> int:
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


@dataclass(frozen=True)
class Spread:
    """That of a row, and of the control in the same rounds."""

    row: float
    control: float

    @property
    def missed(self) -> bool:
        """Whether the row lay wider than the aim though the machine did not."""
        return self.row > AIM >= self.control


def measure() -> dict[str, Spread]:
    """The suite, by the harness, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "rows.jsonl"
        command = [
            sys.executable, "-m", "mbkern", "bench", "cached", "--suite-file", __file__,
            "--threads", "1", "--allocators", "recycled", "--output", str(output),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured = [row for row in rows.load(output)[0] if row.status == rows.MEASURED]
    found = {(f"{r.case} {r.dtype}", r.provider): summarise(r.samples_s).spread for r in measured}
    return {
        case: Spread(spread, found[case, CONTROL])
        for (case, provider), spread in found.items()
        if provider != CONTROL
    }


def quietest(passes: Sequence[dict[str, Spread]]) -> dict[str, Spread]:
    """Each row from the pass whose control lay closest together."""
    return {case: min((p[case] for p in passes), key=lambda s: s.control) for case in passes[0]}


def main(argv: Sequence[str]) -> int:
    """Measure, print from the widest to the narrowest, write."""
    parser = argparse.ArgumentParser(prog="bench/spread.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--passes", type=count, default=PASSES, metavar="N")
    args = parser.parse_args(argv)
    check_output(args.output, parser)
    spreads = quietest([measure() for _ in range(args.passes)])
    in_order = sorted(spreads, key=lambda case: -spreads[case].row)
    print("    row  control")
    for case in in_order:
        print(f"{spreads[case].row:7.2%}  {spreads[case].control:7.2%}  {case}")
    missed = sum(spread.missed for spread in spreads.values())
    wide = sum(spread.row > AIM for spread in spreads.values())
    median = statistics.median(spread.row for spread in spreads.values())
    print(
        f"median {median:.2%}; {wide} of {len(spreads)} rows above {AIM:.0%}, "
        f"{missed} of them while the control was not"
    )
    result = {
        "machine": machine.describe(),
        "aim": AIM,
        "passes": args.passes,
        "median": round(median, 4),
        "rows above the aim": f"{wide} of {len(spreads)}",
        "rows above the aim, their control not": f"{missed} of {len(spreads)}",
        "spread of the row and of its control": {
            case: [round(spreads[case].row, 4), round(spreads[case].control, 4)]
            for case in in_order
        },
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
