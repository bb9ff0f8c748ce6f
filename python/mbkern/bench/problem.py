"""What a suite consists of: cases, and the problems that they become on the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mbkern.bench.timing import Effort, Way

#: Largest error that is not called wrong, relative to the largest exact value. In bf16 torch rounds
#: the log-softmax, whose values reach 16: half a unit in the last place there is 2^-5, and so is
#: the relative error of a probability. Chains of operations round four times as often.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}

DEFAULT_PROVIDERS = ("torch", "mbkern", "limit")


@dataclass(frozen=True)
class Plan:
    """The command line's choices, as every worker gets them.

    Attributes:
        suites: names, in order.
        device: "cpu" or "cuda".
        allocator: the state of the C library's allocator that the process is in.
        threads: numbers of threads; every case is measured with each.
        short: few and small cases.
        seconds: measuring time of a group of providers.
        warm_up: seconds before it.
        least: samples at least.
        repeats: samples exactly, instead of a time.
        compile: whether torch.compile is measured (it compiles for 10 s a case).
        cache: "warm" or "cold": whether the caches are swept before each run.
        only: provider names must contain one of these; empty: all.
        model: only cases of this model; empty: all.
        loss: the loss of the suites minibatch and scaling.
        directions: only these of both, forward and backward; empty: all.
        suite_file: a Python file with suites of the user's: functions of a Plan that return cases.
    """

    suites: tuple[str, ...] = ()
    device: str = "cpu"
    allocator: str = "default"
    threads: tuple[int, ...] = (1,)
    short: bool = False
    seconds: float = 1.0
    warm_up: float = 0.2
    least: int = 7
    repeats: int | None = None
    compile: bool = False
    cache: str = "warm"
    only: tuple[str, ...] = ()
    model: str = ""
    loss: str = "cross_entropy"
    directions: tuple[str, ...] = ()
    suite_file: str = ""

    @property
    def effort(self) -> Effort:
        """How long to measure a group."""
        return Effort(self.seconds, self.warm_up, self.least, 2000, self.repeats)

    def wants(self, provider: str) -> bool:
        """Whether this provider was asked for; limits are always."""
        found = any(part in provider for part in self.only)
        return not self.only or provider.startswith("limit") or found

    def to_json(self) -> str:
        """The plan as one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse; fields that this version does not know are ignored."""
        data = json.loads(text)
        known = {k: v for k, v in data.items() if k in Plan.__dataclass_fields__}
        lists = {k: tuple(v) for k, v in known.items() if isinstance(v, list)}
        return Plan(**{**known, **lists})


@dataclass
class Problem:
    """The ways to compute one thing, side by side.

    Attributes:
        ways: what is measured, in this order in every round.
        tolerance: errors above it are wrong.
        skipped: ways that cannot be taken, each with the reason.
        baseline: the way that others are compared with.
        close: called at the end.
    """

    ways: list[Way]
    tolerance: float = TOLERANCE[torch.float32]
    skipped: dict[str, str] = field(default_factory=dict)
    baseline: str = "torch"
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One thing to measure, before any memory is taken.

    Attributes:
        suite: the suite's name.
        name: what the tables call it.
        shape: of the input.
        dtype: "float32", "bfloat16" or "float16".
        build: makes its problem; called in the process that measures, with the plan.
        size: what it is plotted over; ``axis`` says what that is.
        direction: "both", "forward", "backward"; ways may have their own.
        threads: a number of threads instead of the plan's.
        extra: what else its records shall hold.
    """

    suite: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    build: Callable[[Plan], Problem] = field(compare=False)
    size: float = 0.0
    axis: str = "elements"
    direction: str = "both"
    threads: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


def worse(a: float, b: float) -> float:
    """The larger error; NaN is the worst of all."""
    return a if a >= b or a != a else b


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    found: torch.dtype = getattr(torch, name)
    return found
