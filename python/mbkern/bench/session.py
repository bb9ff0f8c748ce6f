"""The parent's end of a worker process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mbkern.bench.allocator import environment
from mbkern.bench.problem import Plan
from mbkern.bench.rows import Row

PATIENCE = 10.0  # seconds that an interrupted worker has to hand over what it measured
FOLDER = os.sep  # where builds are compared: nothing lies there that could be imported


class Died(RuntimeError):
    """The worker ended, or said something that is no answer."""


class Session:
    """A worker process, in a session of its own: Ctrl-C reaches it through this object only.

    Raises Died from any call once the process has ended, RuntimeError for what failed in it.

    Attributes:
        cases: what its plan has to measure: suite, case, dtype, direction, threads.
        skipped: suites that it cannot measure, and why.
        interrupted: whether Ctrl-C came; the answer to the command at that moment was still read.
        died: whether a call has raised Died.
    """

    def __init__(self, plan: Plan, python: str = sys.executable, folder: str | None = None) -> None:
        """``folder``: that it starts in; what can be imported there hides what is installed."""
        self.interrupted = self.died = False
        self._process = subprocess.Popen(
            [python, "-m", "mbkern.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment(plan.allocator), start_new_session=True, cwd=folder,
        )  # fmt: skip
        self._started = False
        try:
            answer = self.ask("plan", plan=plan.to_json())
        except BaseException:
            self._process.kill()
            self.end()
            raise
        self._started = True
        self.cases: list[tuple[str, ...]] = [tuple(c) for c in answer["cases"]]
        self.skipped: dict[str, str] = answer["skipped"]

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        At Ctrl-C the worker is interrupted, and has PATIENCE seconds to answer with what it has.
        """
        line = json.dumps({"do": what, "with": arguments}) + "\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError as error:
            raise self._death() from error
        text = self._read()
        try:
            answer: dict[str, Any] = json.loads(text)
        except ValueError:
            if self.interrupted:
                raise KeyboardInterrupt from None
            raise self._death() from None
        self.interrupted |= bool(answer.get("interrupted"))
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def _read(self) -> bytes:
        output = self._process.stdout
        assert output is not None
        try:
            return output.readline()
        except KeyboardInterrupt:
            self.interrupted = True
            if not self._started:  # it still imports torch, and has nothing to hand over
                raise
            self._process.send_signal(signal.SIGINT)
            ready, _, _ = select.select([output], [], [], PATIENCE)
            return output.readline() if ready else b""

    def rows(self, answer: dict[str, Any]) -> list[Row]:
        """The rows of an answer."""
        return [Row.from_json(json.loads(text)) for text in answer.get("rows", [])]

    def _death(self) -> Died:
        self.died = True
        return Died(self._ending())

    def _ending(self) -> str:
        status = self._process.poll()
        if status is None:
            time.sleep(0.2)
            status = self._process.poll()
        if status is not None and status < 0:
            return f"the measuring process was ended by {signal.Signals(-status).name}"
        return f"the measuring process ended with status {status}; see above"

    def end(self) -> None:
        """Let the process go."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def located(python: str) -> str:
    """An interpreter's path from anywhere; a bare name is looked for where the shell does."""
    return str(Path(python).absolute()) if os.sep in python else python  # a venv's is a link


def interpreter(python: str) -> str:
    """The folder of a Python's mbkern.bench, checked; RuntimeError says what is missing.

    Started in FOLDER, as its workers are.
    """
    command = [python, "-c", "import torch, mbkern.bench.worker, mbkern; print(mbkern.__file__)"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=FOLDER, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"mbkern bench: cannot run {python}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"mbkern bench: {python} has no mbkern that can be measured: {last}")
    return str(Path(done.stdout.strip()).parent)
