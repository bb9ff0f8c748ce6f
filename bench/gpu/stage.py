"""What a stage is, and how it runs other programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 450.0  # seconds that a stage may take, of the eight minutes that are promised

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass
class Report:
    """What came out of a stage.

    Attributes:
        verdict: "passed", "failed" or "not run".
        reason: why, in a line; empty where all is said by the verdict.
        details: what goes into the results file.
    """

    verdict: str
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Clock:
    """The time that a stage has left."""

    def __init__(self, limit: float = LIMIT) -> None:
        self._end = time.monotonic() + limit

    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: its exit status, or None if it was stopped because time was up.
        output: standard output and error together.
        seconds: how long it ran.
    """

    status: int | None
    output: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.status == 0

    def ending(self, lines: int = 1) -> str:
        """The last lines that say something."""
        said = [line for line in self.output.splitlines() if line.strip()]
        return "\n".join(said[-lines:])

    def failure(self) -> str:
        """In a line what went wrong."""
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s"
        return f"status {self.status}: {self.ending()}"


def run(
    command: Sequence[str | Path],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    *,
    show: bool = False,
) -> Outcome:
    """Run a program in the repository, stop it when time is up; ``show``: its output is printed."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=None if show else output, stderr=None if show else subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with what it has started
                child.wait()
        output.seek(0)
        text = output.read()
    return Outcome(status, text, time.monotonic() - start)


def python(*arguments: str | Path) -> list[str | Path]:
    """The command that runs this very Python."""
    return [sys.executable, *arguments]
