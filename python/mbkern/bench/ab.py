"""Two installed builds of mbkern against each other, in turns: A B B A A B B A ...

One worker process for each build; while one measures, the other waits. The processes are started
anew a few times, because where memory happens to lie makes a process faster or slower by some
percent for as long as it lives.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from mbkern.bench import display, measure
from mbkern.bench.problem import Plan
from mbkern.bench.rows import Key, Row
from mbkern.bench.run import Recorder
from mbkern.bench.session import Session

PROCESSES = 5


def run(
    plan: Plan, pythons: Sequence[str], recorders: Sequence[Recorder], processes: int = PROCESSES
) -> None:
    """Measure mbkern's ways of a plan with both interpreters; rows go to both recorders.

    Raises RuntimeError where a worker fails as a whole.
    """
    plan = dataclasses.replace(plan, only=plan.only or ("mbkern",))
    pieces: tuple[dict[Key, Row], dict[Key, Row]] = ({}, {})
    progress: display.Progress | None = None
    try:
        for _ in range(processes):
            sessions = [Session(plan, python) for python in pythons]
            try:
                shared = [c for c in sessions[0].cases if c in sessions[1].cases]
                progress = progress or display.Progress(processes * len(shared))
                for case in shared:
                    progress.case(" ".join(case))
                    _case(plan, sessions, case, pieces, processes)
                    if any(s.interrupted for s in sessions):
                        raise KeyboardInterrupt
            finally:
                for session in sessions:
                    session.end()
    except KeyboardInterrupt:
        for recorder in recorders:
            recorder.interrupted = True
    finally:
        if progress is not None:
            progress.end()
        for recorder, rows in zip(recorders, pieces, strict=True):
            for row in rows.values():
                if row.samples_s:
                    measure.summarise(row)
            recorder.add(list(rows.values()))


def _case(
    plan: Plan,
    sessions: Sequence[Session],
    case: tuple[str, ...],
    pieces: tuple[dict[Key, Row], dict[Key, Row]],
    processes: int,
) -> None:
    opened = [session.ask("open", index=session.cases.index(case)) for session in sessions]
    failed = [s.rows(answer) for s, answer in zip(sessions, opened, strict=True)]
    if any(failed):
        for made, kept in zip(failed, pieces, strict=True):
            kept.update({row.key: row for row in made})
        for session, made in zip(sessions, failed, strict=True):
            if not made:
                session.ask("close")
        return
    effort = plan.effort
    least = -(-(effort.repeats or effort.least) // processes)
    _rounds(sessions, plan.warm_up / processes, 1, effort.most, False)
    if effort.repeats:
        _rounds(sessions, 0.0, least, least, True)
    else:
        _rounds(sessions, 2 * effort.seconds / processes, least, effort.most, True)
    for session, rows in zip(sessions, pieces, strict=True):
        for row in session.rows(session.ask("close")):
            if row.limit:
                continue
            known = rows.setdefault(row.key, row)
            known.blocks.append(len(row.samples_s))
            if known is not row:
                known.samples_s += row.samples_s
                known.status = row.status if row.status != "measured" else known.status


def _rounds(
    sessions: Sequence[Session], seconds: float, least: int, most: int, record: bool
) -> None:
    end = time.monotonic() + seconds
    done = 0
    while done < least or (time.monotonic() < end and done < most):
        for session in sessions if done % 2 == 0 else reversed(sessions):
            session.ask("round", record=record)
        done += 1
