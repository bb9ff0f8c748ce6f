"""Suites of fakes for the tests of the benchmark harness; a file for ``--suite-file``."""

from __future__ import annotations

import os
import signal
import time

from mbkern.bench.problem import Case, Plan, Problem
from mbkern.bench.timing import Way

SLEEP = 0.012
SLOWER = float(os.environ.get("MBKERN_TEST_SLOWER", "1"))


def _right(_: object) -> float:
    return 0.0


def _sleeping(plan: Plan) -> Problem:
    return Problem([Way("mbkern", lambda: time.sleep(SLEEP), check=_right)], baseline="mbkern")


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


def _of(*builds: object) -> object:
    def cases(plan: Plan) -> list[Case]:
        return [
            Case("fake", build.__name__.strip("_"), (1,), "float32", build)  # type: ignore
            for build in builds
        ]

    return cases


SUITES = {
    "sleeping": _of(_sleeping),
    "mixed": _of(_broken, _killed, _mixed),
    "slower": _of(_slower),
}
