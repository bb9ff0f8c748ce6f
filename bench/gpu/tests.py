"""The tests: those that need a GPU, then the others, with what time is left."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from gpu.stage import FAILED, PASSED, Clock, Report, python, run

NO_TESTS = 5  # pytest's status where nothing was collected


def counts(output: str) -> dict[str, int]:
    """The last line of pytest as numbers: {"passed": 3, "failed": 1}."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    found = re.findall(r"(\d+) ([a-z]+)", lines[-1].split(" in ")[0]) if lines else []
    return {what: int(number) for number, what in found}


def _side_by_side() -> list[str]:
    """Options of pytest-xdist, where it is installed: most of a test's time is the host's."""
    quiet = ["-p", "no:benchmark"]  # which warns that it does not work under xdist
    return [*quiet, "-n", "8"] if find_spec("xdist") else []


def check(clock: Clock) -> Report:
    """Run both parts; nothing may fail, and there must be tests of a GPU."""
    details: dict[str, Any] = {}
    wrong = []
    for part, marks in (("gpu", "gpu"), ("others", "not gpu and not slow")):
        done = run(
            python("-m", "pytest", "tests", "-q", "-m", marks, "-p", "no:cacheprovider",
                   *_side_by_side()),
            clock.left(),
        )  # fmt: skip
        found = counts(done.output)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.output, re.MULTILINE)
        details[part] = {"counts": found, "failed": failed[:50], "seconds": round(done.seconds)}
        print(f"{part}: {found}, {done.seconds:.0f} s", *failed, sep="\n  ", flush=True)
        if done.status == NO_TESTS:
            wrong.append(f"{part}: no test was found")
        elif not done.good:
            wrong.append(f"{part}: {done.failure()}")
    return Report(FAILED if wrong else PASSED, "; ".join(wrong), details)


def rehearse(clock: Clock) -> Report:
    """Only collect the tests that need a GPU."""
    done = run(python("-m", "pytest", "tests", "-q", "-m", "gpu", "--collect-only"), clock.left())
    print(done.ending(3))
    return Report(PASSED if done.status in (0, NO_TESTS) else FAILED, done.ending())
