"""Run suites: a worker process for each state of the allocator, rows written as they come."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from mbkern._cli import INTERRUPTED
from mbkern.bench import conclusions, display, tables
from mbkern.bench.problem import Plan
from mbkern.bench.rows import ALL, FAILED, SKIPPED, WRONG, Row, append
from mbkern.bench.session import Died, Session


class Recorder:
    """Keeps rows, and writes each to a file as soon as it is there.

    Attributes:
        rows: all of them, in order.
        interrupted: whether Ctrl-C ended the run.
        unwritten: why rows are missing in the file, if so.
    """

    def __init__(self, output: Path | None, pair: str = "") -> None:
        self.rows: list[Row] = []
        self.interrupted = False
        self.unwritten = ""
        self._output, self._pair = output, pair
        self._run = secrets.token_hex(6)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows and write them."""
        for row in rows:
            row.run, row.pair = self._run, self._pair
        self.rows += rows
        if self._output is None or self.unwritten:
            return
        try:
            append(self._output, rows)
        except OSError as error:
            self.unwritten = f"cannot write {self._output}: {error.strerror}"
            print(f"{self.unwritten}; measuring goes on", file=sys.stderr)

    def skip(self, suite: str, reason: str, plan: Plan, status: str = SKIPPED) -> None:
        """A suite or case that has no rows, and why."""
        row = Row(suite, ALL, [], "", "both", ALL, plan.device, "", max(plan.threads))
        row.allocator, row.status, row.reason = plan.allocator, status, reason
        self.add([row])


def states(plan: Plan) -> tuple[str, ...]:
    """The allocator states that make a difference: none to a GPU."""
    return ("default",) if plan.device == "cuda" else ("default", "recycled")


def run(plan: Plan, allocators: Sequence[str], recorder: Recorder) -> None:
    """Measure a plan in each of the allocator's states.

    A worker that dies (a crash, the system's memory killer) costs the case that it was at.
    """
    for allocator in allocators:
        here = dataclasses.replace(plan, allocator=allocator)
        try:
            _in_state(here, recorder)
        except BrokenPipeError:  # whoever read what is said on the way has gone
            raise
        except (RuntimeError, OSError) as failure:
            recorder.skip(", ".join(plan.suites), str(failure), here, FAILED)
        except KeyboardInterrupt:
            recorder.interrupted = True
        if recorder.interrupted:
            return


def _in_state(plan: Plan, recorder: Recorder) -> None:
    session = Session(plan)
    for suite, reason in session.skipped.items():
        recorder.skip(suite, reason, plan)
    progress = display.Progress(len(session.cases))
    try:
        for index, (suite, name, dtype, direction, threads) in enumerate(session.cases):
            progress.case(f"{suite}: {name} {dtype} {direction}, {threads} thr., {plan.allocator}")
            try:
                answer = session.ask("measure", index=index)
            except Died as death:
                recorder.add([died(plan, session.cases[index], death)])
                session.end()
                session = Session(plan)
                continue
            recorder.add(session.rows(answer))
            if session.interrupted:
                recorder.interrupted = True
                return
    finally:
        progress.end()
        session.end()


def died(plan: Plan, case: tuple[str, ...], death: Died) -> Row:
    """The row of a case that ended its process."""
    suite, name, dtype, direction, threads = case
    return Row(suite, name, [], dtype, direction, ALL, plan.device, "", int(threads),
               plan.allocator, plan.cache, FAILED, str(death))  # fmt: skip


def show(rows: Sequence[Row], command: str) -> None:
    """Tables of what was measured, what it means, and warnings."""
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        by_suite.setdefault(row.suite, []).append(row)
    for suite, members in by_suite.items():
        table = display.suite_table(suite, members)
        if table.rows:
            tables.show(table)
    if any(row.samples_s for row in rows):
        print("\n".join([*display.LEGEND, ""]))
    for table in conclusions.tables(rows):
        tables.show(table)
    measured = next((r for r in rows if r.environment), None)
    if measured is not None:
        tables.show(display.machine_table(measured, command=command))
    for text in conclusions.notes(rows):
        print(f"note: {text}")
    for text in display.skipped(rows):
        print(f"skipped: {text}")
    for text in display.warnings(rows):
        print(f"warning: {text}")


def status(recorder: Recorder, only: Sequence[str] = ()) -> int:
    """0: all is well; 1: something was wrong or failed, or nothing was measured; 130: Ctrl-C.

    ``only``: what the names of providers had to contain. Limits are measured in any case.
    """
    if recorder.interrupted:
        print("interrupted: what was measured is shown", file=sys.stderr)
        return INTERRUPTED
    bad = any(row.status in (WRONG, FAILED) for row in recorder.rows)
    timed = [row.provider for row in recorder.rows if row.samples_s]
    for part in only:
        if not any(part in row.provider for row in recorder.rows):
            print(f"warning: no provider's name contains {part!r}", file=sys.stderr)
    if not any(part in name for part in only or ("",) for name in timed):
        why = "all failed" if bad else "no case is left by what was asked for"
        print(f"nothing was measured: {why}", file=sys.stderr)
        return 1
    return int(bad or bool(recorder.unwritten))
