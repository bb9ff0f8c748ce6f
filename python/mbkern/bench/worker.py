"""A process that measures: ``python -m mbkern.bench.worker``, started by :mod:`session`.

Commands are JSON lines on the standard input, answers JSON lines on what was the standard output
(which prints go away from, to the standard error, so that no library spoils an answer). The state
of the allocator is that of a process, and chosen by its environment; so is the build of mbkern.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any

import torch  # noqa: F401  before mbkern, which uses its OpenMP runtime

from mbkern.bench import measure, suites
from mbkern.bench.allocator import fill_reserve
from mbkern.bench.problem import Case, Plan
from mbkern.bench.results import Entry
from mbkern.bench.rows import ALL, FAILED, Row
from mbkern.bench.timing import once

Answer = dict[str, Any]


class Worker:
    """Answers commands: plan, measure, open, round, close."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._plan = Plan()
        self._todo: list[tuple[Case, int]] = []
        self._group: measure.Group | None = None
        self._cpus = os.sched_getaffinity(0)
        self._busy = False

    def interrupt(self, *_: object) -> None:
        """End the command at hand; one that was just answered is no longer to be ended."""
        if self._busy:
            raise KeyboardInterrupt

    def serve(self, commands: Iterator[str]) -> None:
        """Until the input ends."""
        for line in commands:
            command = json.loads(line)
            try:
                self._busy = True
                answer = json.dumps(getattr(self, command["do"])(**command.get("with", {})))
                self._busy = False
            except KeyboardInterrupt:
                self._busy, answer = False, json.dumps({"interrupted": True})
            except Exception as failure:  # the parent says what it was; the next command may work
                said = f"{type(failure).__name__}: {failure}"
                self._busy, answer = False, json.dumps({"failed": said})
            self._answers.write(answer + "\n")
            self._answers.flush()

    def plan(self, plan: str) -> Answer:
        """Take the command line's choices; answer with what there is to measure."""
        self._plan = Plan.from_json(plan)
        fill_reserve(self._plan.allocator, (1 if self._plan.short else 3) << 30)
        cases, reasons = suites.of(self._plan)
        self._todo = [
            (case, threads)
            for case in cases
            for threads in ((case.threads,) if case.threads else self._plan.threads)
        ]
        labels = [
            [case.suite, case.name, case.dtype, case.direction, str(threads)]
            for case, threads in self._todo
        ]
        return {"cases": labels, "skipped": reasons}

    def measure(self, index: int) -> Answer:
        """All of one case. Ctrl-C: what was measured of it, and ``interrupted``."""
        case, threads = self._todo[index]
        rows: list[Row] = []
        interrupted = False
        try:
            measure.run(case, self._plan, threads, rows.extend)
        except KeyboardInterrupt:
            interrupted = True
        except Exception as failure:  # of all providers at once: the case cannot be made
            rows.append(self._failed(case, threads, failure))
        return {"rows": [r.to_json() for r in rows], "interrupted": interrupted}

    def _failed(self, case: Case, threads: int, failure: Exception) -> Row:
        entry = Entry(ALL)
        entry.fail(failure)
        return Row(
            case.suite, case.name, list(case.shape), case.dtype, case.direction, entry.name,
            self._plan.device, "", threads, self._plan.allocator, self._plan.cache, FAILED,
            entry.note,
        )  # fmt: skip

    def open(self, index: int) -> Answer:
        """Prepare a case for rounds that the parent asks for one by one.

        One thread stays on one CPU, the same in every worker: CPUs differ, by what their siblings
        of other machines do for instance, and a process seldom leaves the one that it started on.
        """
        case, threads = self._todo[index]
        os.sched_setaffinity(0, {min(self._cpus)} if threads == 1 else self._cpus)
        try:
            self._group = measure.Group(case, self._plan, threads)
        except Exception as failure:
            return {"rows": [self._failed(case, threads, failure).to_json()]}
        gc.collect()
        gc.disable()  # until it is closed: as where all ways are timed in one process
        return {"ways": [w.name for w in self._group.ways]}

    def round(self, record: bool = True) -> Answer:
        """Run each way of the open case once."""
        assert self._group is not None, "no case is open"
        for way in self._group.ways:
            row = self._group.rows[way.name]
            try:
                elapsed, _, _ = once(way, self._plan.device)
            except Exception as failure:
                entry = Entry(way.name)
                entry.fail(failure)
                row.status, row.reason = FAILED, entry.note
                continue
            if record:
                row.samples_s.append(elapsed * 1e-9 / way.calls)
        return {}

    def close(self) -> Answer:
        """The rows of the open case."""
        assert self._group is not None, "no case is open"
        group, self._group = self._group, None
        gc.enable()
        return {"rows": [r.to_json() for r in group.finish()]}


def main() -> None:
    """Serve until the input ends; the parent's end ends it too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(answers)
    signal.signal(signal.SIGINT, worker.interrupt)
    worker.serve(iter(sys.stdin.readline, ""))


if __name__ == "__main__":
    main()
