"""Suites of fakes for the tests of the benchmark harness; a file for ``--suite-file``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from mbkern.bench.problem import Case, Plan, Problem
from mbkern.bench.timing import Way

SLEEP = 0.012
SLOWER = float(os.environ.get("MBKERN_TEST_SLOWER", "1"))
LOSES = "MBKERN_TEST_LOSES" in os.environ


@dataclass(frozen=True)
class Sleep:
    """A dataclass in a suite's file, which looks its own module up by name."""

    seconds: float = SLEEP

    def __call__(self) -> None:
        time.sleep(self.seconds)


def _right(_: object) -> float:
    return 0.0


def _sleeping(plan: Plan) -> Problem:
    return Problem([Way("mbkern", Sleep(), check=_right)], baseline="mbkern")


def _raise() -> None:
    raise RuntimeError("no such kernel\nand more")


def _mixed(plan: Plan) -> Problem:
    runs = iter(range(1000))

    def later() -> None:
        if next(runs) > 4:
            raise ValueError("broke")

    ways = [
        Way("torch", lambda: time.sleep(0.001), check=_right),
        Way("wrong", lambda: None, check=lambda _: 1.0),
        Way("nan", lambda: None, check=lambda _: float("nan")),
        Way("raises", _raise),
        Way("raises later", later, check=_right),
        Way("good", lambda: time.sleep(0.001), check=_right),
    ]
    return Problem(ways, skipped={"absent": "not installed"})


def _broken(plan: Plan) -> Problem:
    raise MemoryError("too large")


def _killed(plan: Plan) -> Problem:
    os.kill(os.getpid(), signal.SIGKILL)
    return Problem([])


def _slower(plan: Plan) -> Problem:
    """In an environment that says so, slower by that factor."""
    return Problem([Way("mbkern", lambda: time.sleep(0.002 * SLOWER), check=_right)])


def _raising(plan: Plan) -> Problem:
    return _broken(plan) if LOSES else _slower(plan)


def _dying(plan: Plan) -> Problem:
    runs = iter(range(1000))

    def run() -> None:
        if LOSES and next(runs) == 3:
            _killed(plan)

    return Problem([Way("mbkern", run, check=_right)])


def _poorer(plan: Plan) -> Problem:
    names = ("mbkern",) if LOSES else ("mbkern", "mbkern in place")
    return Problem([Way(name, lambda: None, check=_right) for name in names])


def _losing(plan: Plan) -> list[Case]:
    """In an environment that says so, much of it is lost."""
    kept = [_raising, _dying, _poorer, _slower]
    return _of(*kept)(plan) if LOSES else _of(*kept, _sleeping)(plan)


def _leaving(plan: Plan) -> list[Case]:
    if LOSES:
        raise LookupError("this build has none")
    return [Case("leaving", "left", (1,), "float32", _slower)]


def _of(*builds: Callable[[Plan], Problem]) -> Callable[[Plan], list[Case]]:
    def cases(plan: Plan) -> list[Case]:
        return [Case("fake", build.__name__.strip("_"), (1,), "float32", build) for build in builds]

    return cases


SUITES = {
    "sleeping": _of(_sleeping),
    "mixed": _of(_broken, _killed, _mixed),
    "slower": _of(_slower),
    "losing": _losing,
    "leaving": _leaving,
}
