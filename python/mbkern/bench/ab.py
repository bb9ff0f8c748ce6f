"""Two installed builds of mbkern against each other, in turns: A B B A A B B A ...

One worker process for each build; while one measures, the other waits. The processes are started
anew a few times, because where memory happens to lie makes a process faster or slower by some
percent for as long as it lives.

A case that only one build has, or that fails in the other, is run once by the one that can, so that
both files say so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from mbkern.bench import display, machine, measure
from mbkern.bench.problem import Plan
from mbkern.bench.rows import MEASURED, SKIPPED, Key, Row
from mbkern.bench.run import Recorder, died
from mbkern.bench.session import FOLDER, Died, Session

PROCESSES = 5

_Case = tuple[str, ...]


def run(
    plan: Plan, pythons: Sequence[str], recorders: Sequence[Recorder], processes: int = PROCESSES
) -> None:
    """Measure mbkern's ways of a plan with both interpreters; rows go to both recorders.

    A worker that dies costs the case that it was at. Raises RuntimeError where one cannot start.
    """
    turns = _Turns(replace(plan, only=plan.only or ("mbkern",)), pythons, processes)
    progress: display.Progress | None = None
    try:
        for number in range(processes):
            turns.start()
            if number == 0:
                _skip(turns, recorders)
            cases = turns.cases()
            progress = progress or display.Progress(processes * len(cases))
            for case in cases:
                progress.case(" ".join(case))
                turns.measure(case)
    except KeyboardInterrupt:
        for recorder in recorders:
            recorder.interrupted = True
    finally:
        if progress is not None:
            progress.end()
        # First of all: who waits for the processes may press Ctrl-C again.
        for recorder, rows in zip(recorders, turns.finished(), strict=True):
            recorder.add(rows)
        turns.end()


def _skip(turns: _Turns, recorders: Sequence[Recorder]) -> None:
    for session, recorder in zip(turns.sessions, recorders, strict=True):
        for suite, reason in session.skipped.items():
            recorder.skip(suite, reason, turns.plan)


class _Turns:
    """The two workers, started anew where one has died, and what each has measured.

    Attributes:
        rows: of each worker, by case.
        settled: cases that are not measured in turns, and are done.
    """

    def __init__(self, plan: Plan, pythons: Sequence[str], processes: int) -> None:
        self.plan, self._pythons, self._processes = plan, pythons, processes
        self.sessions: list[Session] = []
        self.rows: tuple[dict[_Case, dict[Key, Row]], ...] = ({}, {})
        self.settled: set[_Case] = set()
        self._pairs = 0
        self._load = machine.OtherLoad()

    def start(self) -> None:
        """New processes."""
        self.end()
        self._pairs += 1
        for python in self._pythons:
            self.sessions.append(Session(self.plan, python, FOLDER))

    def end(self) -> None:
        """Let the processes go."""
        for session in self.sessions:
            session.end()
        self.sessions = []

    def cases(self) -> list[_Case]:
        """What at least one of them has, and is still to be measured."""
        found = dict.fromkeys(case for session in self.sessions for case in session.cases)
        return [case for case in found if case not in self.settled]

    def finished(self) -> list[list[Row]]:
        """The rows of each, with their statistics."""
        found = [[r for rows in side.values() for r in rows.values()] for side in self.rows]
        for row in (row for rows in found for row in rows if row.samples_s):
            measure.summarise(row)
        return found

    def measure(self, case: _Case) -> None:
        """In turns where both can; else alone and once, so that it is known what the other lacks.

        Raises KeyboardInterrupt after Ctrl-C, with what was measured kept.
        """
        sides = [k for k, session in enumerate(self.sessions) if case in session.cases]
        self._load = machine.OtherLoad([session.pid for session in self.sessions])
        if len(sides) < 2 or not self._in_turns(case):
            self.settled.add(case)
            for side in sides:
                if case not in self.rows[side]:
                    self._alone(side, case)
        if any(session.interrupted for session in self.sessions):
            raise KeyboardInterrupt

    def _in_turns(self, case: _Case) -> bool:
        try:
            opened = [self._open(side, case) for side in (0, 1)]
            if all(opened):
                self._rounds()
                for side in (0, 1):
                    self._close(side, case)
                return True
            if any(opened):
                self.sessions[opened.index(True)].ask("close")
        except Died as death:
            self._bury(case, death)
        return False

    def _alone(self, side: int, case: _Case) -> None:
        try:
            if self._open(side, case):
                self.sessions[side].ask("round")
                self._close(side, case)
        except Died as death:
            self._bury(case, death)

    def _bury(self, case: _Case, death: Died) -> None:
        """The case is lost to whoever died at it; both go on in new processes."""
        row = died(self.plan, case, death)
        for side, session in enumerate(self.sessions):
            if session.died:
                self.rows[side][case] = {row.key: row}
        self.start()

    def _open(self, side: int, case: _Case) -> bool:
        """Prepare a case; where that fails, nothing else of it counts on this side."""
        session = self.sessions[side]
        failed = session.rows(session.ask("open", index=session.cases.index(case)))
        if failed:
            self.rows[side][case] = {row.key: row for row in failed}
        return not failed

    def _close(self, side: int, case: _Case) -> None:
        session, rows = self.sessions[side], self.rows[side].setdefault(case, {})
        closed, load = session.rows(session.ask("close")), self._load.cpus()
        for row in closed:
            if row.limit:
                continue
            row.bandwidth_share = None  # of one process, and of a limit that is not kept
            known = rows.setdefault(row.key, row)
            known.blocks.append(len(row.samples_s))
            _note_load(known, load)
            if known is not row:
                known.samples_s += row.samples_s
                # What Ctrl-C came before the first sample of has those of earlier processes.
                if row.status != MEASURED and not (row.status == SKIPPED and known.samples_s):
                    known.status, known.reason = row.status, row.reason

    def _rounds(self) -> None:
        plan, effort = self.plan, self.plan.effort
        least = -(-(effort.repeats or effort.least) // self._processes)
        _rounds(self.sessions, plan.warm_up / self._processes, 1, effort.most, False)
        # Whoever is first pays for it; an odd round has no other to make up for that.
        sessions = self.sessions if self._pairs % 2 else self.sessions[::-1]
        if effort.repeats:
            _rounds(sessions, 0.0, least, least, True)
        else:
            seconds = 2 * effort.seconds / self._processes
            _rounds(sessions, seconds, least, effort.most, True)


def _note_load(row: Row, cpus: float | None) -> None:
    """The most that others took, of all processes; to a worker its twin is one of the others."""
    name = "cpus taken by others"
    before = row.environment.get(name) if len(row.blocks) > 1 else None
    row.environment[name] = max(filter(None, (before, cpus)), default=cpus)


def _rounds(
    sessions: Sequence[Session], seconds: float, least: int, most: int, record: bool
) -> None:
    end = time.monotonic() + seconds
    done = 0
    while done < least or (time.monotonic() < end and done < most):
        if any(session.interrupted for session in sessions):
            return
        for session in sessions if done % 2 == 0 else reversed(sessions):
            session.ask("round", record=record)
        done += 1
