"""Loss and gradient of cross-entropy: torch, torch.compile, mbkern, and the machine's limit.

Timed: the loss, its backward, and the memory of temporaries and of the gradient (taken, first
touched; temporaries given back). Not timed: restoring the logits, dropping the gradient,
compilation. Before each timed run, whichever way it is, the restoring copy has just passed over the
logits.

The limit is a bare exponential over the logits' own buffer, one read and one write, by the kernels
of the same instruction set on one thread: nothing that computes a softmax in place can be faster
than the one pass it needs. torch's ``exp_`` stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from suite_settings import ALL, NONE, Settings, progress
from torch import Tensor

import mbkern
from mbkern import _C
from mbkern.bench.allocator import DEFAULT, RECYCLED
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Way, interleave
from suites.problem import TOLERANCE, Case, Problem, backward

STATES = (DEFAULT, RECYCLED)
SUITE = "cross-entropy"
TORCH, COMPILED = "torch", "torch.compile"
AUTOGRAD, IN_PLACE = "mbkern autograd", "mbkern in place"
LIMIT, TORCH_EXP = "limit: bare exp", "torch exp_"
LONG = 32000  # columns from which torch.compile is measured unless all is asked for

Result = tuple[Tensor, Any]

CASES = (
    Case((512, 32000)),
    Case((128, 128256)),
    Case((8192, 1000)),
    Case((8, 21, 512, 512)),
    Case((512, 32000), torch.bfloat16),
    Case((128, 128256), torch.bfloat16),
)
QUICK = (CASES[0], CASES[2], CASES[4])


def ways_of(problem: Problem) -> dict[str, Callable[[], Result]]:
    """What is timed, by name: each returns the loss and the gradient."""
    x, y, t = problem.logits, problem.plain, problem.target
    return {
        TORCH: lambda: backward(F.cross_entropy(x, t), x),
        AUTOGRAD: lambda: backward(mbkern.functional.cross_entropy(x, t), x),
        IN_PLACE: lambda: mbkern.loss_and_grad("cross_entropy", y, t, grad_out=y),
    }


def _compiled(problem: Problem) -> Callable[[], Result]:
    """torch.compile's forward and backward, for this very shape and number of threads."""
    torch._dynamo.reset()
    x, t = problem.logits, problem.target
    function = torch.compile(lambda x, t: F.cross_entropy(x, t), dynamic=False)
    return lambda: backward(function(x, t), x)


def _exponentials(problem: Problem) -> list[tuple[Way, float]]:
    """The bare exponentials with their errors; on one thread, in fp32."""
    address, n = problem.plain.data_ptr(), problem.plain.numel()
    isa = _C.isa()
    checked = []
    for name, run in (
        (LIMIT, lambda: _C.elementary(isa, "exp_nonpositive", False, address, address, n)),
        (TORCH_EXP, lambda: problem.plain.exp_()),
    ):
        problem.restore()
        run()
        checked.append((Way(name, run, problem.restore), problem.exp_error()))
    return checked


def _measure(problem: Problem, threads: int, settings: Settings) -> Group:
    case = problem.case
    functions = ways_of(problem)
    skipped: list[Entry] = []
    if settings.compile == ALL or (settings.compile != NONE and case.columns >= LONG):
        functions[COMPILED] = _compiled(problem)
    else:
        skipped.append(Entry(COMPILED, note="skipped: see --compile"))
    ways: list[Way] = []
    errors: dict[str, float] = {}
    for name, run in functions.items():
        problem.restore()
        try:
            errors[name] = problem.error(run())
        except Exception as failure:  # no compiler, or one that cannot do it
            if name != COMPILED:
                raise
            lines = str(failure).strip().splitlines() or [""]
            reason = f"{type(failure).__name__}: {lines[0]}"
            skipped.append(Entry(COMPILED, note=f"skipped: {reason[:100]}"))
            continue
        ways.append(Way(name, run, problem.restore))
    if threads == 1 and case.dtype is torch.float32:
        for way, error in _exponentials(problem):
            ways.append(way)
            errors[way.name] = error
    problem.restore()

    entries = interleave(ways, settings.effort(3.0, least=5))
    for entry in entries:
        entry.error = errors[entry.name]
        entry.correct = entry.error <= TOLERANCE[case.dtype]
    return Group(
        SUITE, str(case), threads, settings.allocator, "ms", TORCH, entries + skipped,
        case.columns, case.dtype_name,
    )  # fmt: skip


def run(settings: Settings) -> list[Group]:
    """Every case at every number of threads."""
    groups = []
    for case in QUICK if settings.quick else CASES:
        problem = Problem(case)
        for threads in settings.threads:
            progress(str(case), threads)
            torch.set_num_threads(threads)
            groups.append(_measure(problem, threads, settings))
    return groups
