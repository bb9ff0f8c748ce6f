"""What it costs to reach the kernels through torch's other doors: torch.compile, ``patched()``.

Compiled: forward and backward of the loss alone, after compilation; timed as in the suite
cross-entropy. Beside it, in the same rounds, what torch.compile adds to an operator without mbkern:
its kernel is a sum over the same logits, which leaves the caches as cold, its gradient an expanded
number; eagerly it is an autograd Function.
``patched()``: short calls; a sample is the mean of a block of calls. "Other call" is
a torch function that is no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from suite_settings import Settings, progress
from torch import Tensor, library

import mbkern
from mbkern.bench.allocator import DEFAULT, RECYCLED
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Way, interleave
from suites.problem import TOLERANCE, Case, Problem, backward

STATES = (DEFAULT, RECYCLED)
SUITE = "integration"
EAGER, COMPILED = "mbkern eager", "mbkern compiled"
SUM_EAGER, SUM_COMPILED = "sum eager", "sum compiled"
LESS = "mbkern compiled, less what compiling adds to a sum"
DIRECT, PATCHED, MODE = "mbkern.functional", "patched()", "patched(mode=True)"
OUTSIDE = "outside"
INTERCEPTED, OTHER = "intercepted call", "other call"
CALLS = 200


@library.custom_op("mbkern_bench::total", mutates_args=())
def _operator(x: Tensor) -> Tensor:
    return x.sum()


@_operator.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(())


def _set_up(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        return incoming.expand(ctx.shape)


_operator.register_autograd(_Sum.backward, setup_context=_set_up)


def _compiled(settings: Settings, threads: int) -> Group:
    case = Case((512, 32000))
    problem = Problem(case)
    torch._dynamo.reset()
    x, t = problem.logits, problem.target
    function = torch.compile(lambda x, t: mbkern.functional.cross_entropy(x, t), dynamic=False)
    operator = torch.compile(_operator, dynamic=False)

    def gradient_of_sum(function: Callable[[Any], Any]) -> None:
        torch.autograd.grad(function(x), x)  # expanded: nothing of the size of the logits

    runs = {
        EAGER: lambda: backward(mbkern.functional.cross_entropy(x, t), x),
        COMPILED: lambda: backward(function(x, t), x),
        SUM_EAGER: lambda: gradient_of_sum(_Sum.apply),
        SUM_COMPILED: lambda: gradient_of_sum(operator),
    }
    errors = {}
    for name in (EAGER, COMPILED):
        problem.restore()
        errors[name] = problem.error(runs[name]())
    ways = [Way(name, run, problem.restore) for name, run in runs.items()]
    entries = interleave(ways, settings.effort(5.0, least=5))
    for entry in entries:
        entry.error = errors.get(entry.name)
        entry.correct = entry.error is None or entry.error <= TOLERANCE[case.dtype]
    of = {entry.name: entry.samples for entry in entries}
    rounds = zip(of[COMPILED], of[SUM_COMPILED], of[SUM_EAGER], strict=False)  # one may fail
    entries.append(Entry(LESS, [ours - (sum_ - eager) for ours, sum_, eager in rounds]))
    return Group(
        SUITE, f"compiled, {case}", threads, settings.allocator, "ms", EAGER, entries,
        case.columns, case.dtype_name,
    )  # fmt: skip


def _within(context: Callable[[], AbstractContextManager[Any]], call: Callable[[], Any]) -> Way:
    def run() -> None:
        with torch.no_grad(), context():
            for _ in range(CALLS):
                call()

    return Way("", run)


def _patched(settings: Settings, threads: int) -> list[Group]:
    x, t = torch.randn(32, 10), torch.arange(32) % 10

    def theirs() -> Any:
        return F.cross_entropy(x, t)

    def ours() -> Any:
        return mbkern.functional.cross_entropy(x, t)

    def other() -> Any:
        return torch.neg(x)

    def mode() -> AbstractContextManager[Any]:
        return mbkern.patched(mode=True)

    cases = {
        INTERCEPTED: {
            DIRECT: _within(nullcontext, ours),
            PATCHED: _within(mbkern.patched, theirs),
            MODE: _within(mode, theirs),
        },
        OTHER: {
            OUTSIDE: _within(nullcontext, other),
            PATCHED: _within(mbkern.patched, other),
            MODE: _within(mode, other),
        },
    }
    groups = []
    for case, ways in cases.items():
        named = [Way(name, way.run) for name, way in ways.items()]
        entries = interleave(named, settings.effort(1.5, least=30), unit=1e-3 / CALLS)
        for entry in entries:
            entry.correct = True
        groups.append(
            Group(SUITE, case, threads, settings.allocator, "us", named[0].name, entries, 10)
        )
    return groups


def run(settings: Settings) -> list[Group]:
    """The compiled loss in both allocator states, ``patched()`` in one."""
    groups = []
    for threads in settings.threads:
        torch.set_num_threads(threads)
        progress("compiled (512, 32000)", threads)
        groups.append(_compiled(settings, threads))
        if settings.allocator == DEFAULT:
            progress("patched()", threads)
            groups += _patched(settings, threads)
    return groups
