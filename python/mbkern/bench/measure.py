"""From a case to rows: checked first, then its memory, then timed in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mbkern import _C
from mbkern.bench import machine, memory, statistics
from mbkern.bench.problem import Case, Plan, Problem
from mbkern.bench.results import Entry
from mbkern.bench.rows import FAILED, MEASURED, SKIPPED, WRONG, Row
from mbkern.bench.timing import Interrupted, Way, interleave


class Group:
    """A case on the machine: its providers, those that work, and a row for each.

    A provider that raises, in its check or later, is reported as failed, and the others go on.
    """

    def __init__(self, case: Case, plan: Plan, threads: int) -> None:
        self.case, self.plan = case, plan
        self.threads = case.threads or threads
        self._isa = _C.isa() if plan.device == "cpu" else ""
        torch.set_num_threads(self.threads)
        self.load = machine.OtherLoad()
        self.before = machine.conditions()
        self.problem: Problem = case.build(plan)
        self.ways: list[Way] = []
        self.rows: dict[str, Row] = {}
        self._sweep: torch.Tensor | None = None
        names = [*(way.name for way in self.problem.ways), *self.problem.skipped]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two ways have the name {twice!r}, and would share their samples")
        for way in self.problem.ways:
            if plan.wants(way.name):
                self._admit(way)
        for name, reason in self.problem.skipped.items():
            if plan.wants(name):
                self.rows[name] = self._row(Way(name, lambda: None), status=SKIPPED, reason=reason)

    def _row(self, way: Way, **facts: Any) -> Row:
        case, plan = self.case, self.plan
        isa = way.isa or (self._isa if way.name.startswith("mbkern") else "")
        return Row(
            suite=case.suite, case=case.name, shape=list(case.shape), dtype=case.dtype,
            direction=way.direction if way.direction != "both" else case.direction,
            provider=way.name, device=plan.device, isa=isa, threads=self.threads,
            allocator=plan.allocator, cache=plan.cache, calls=way.calls, bytes=way.bytes,
            flops=way.flops, limit=way.limit, tolerance=self.problem.tolerance,
            baseline=self.problem.baseline, size=case.size, axis=case.axis,
            extra={**case.extra, **way.extra}, **facts,
        )  # fmt: skip

    def _admit(self, way: Way) -> None:
        """Run a way once, hold its result to fp64, and measure its memory in a second run."""
        row = self.rows[way.name] = self._row(way)
        try:
            way.prepare()
            result = way.run()
            if way.check is not None:
                row.error_vs_fp64 = float(way.check(result))
            del result
            if self.plan.allocator == "default" and not way.limit and way.calls == 1:
                way.prepare()
                row.peak_bytes = memory.peak(way.run, self.plan.device)
        except Exception as failure:
            entry = Entry(way.name)
            entry.fail(failure)
            row.status, row.reason = FAILED, entry.note
            return
        error = row.error_vs_fp64
        if error is not None and not error <= self.problem.tolerance:
            row.status = WRONG
            row.reason = f"error {error:.1e} against fp64, above {self.problem.tolerance:.1e}"
        self.ways.append(self._swept(way) if self.plan.cache == "cold" else way)

    def _swept(self, way: Way) -> Way:
        """The same with cold caches: three times the last level is read between runs."""
        if self._sweep is None:
            floats = 3 * machine.last_level_cache() // 4
            self._sweep = torch.ones(floats, device=self.plan.device)
        block = self._sweep

        def prepare() -> None:
            way.prepare()
            block.add_(1)

        return dataclasses.replace(way, prepare=prepare)

    def measure(self) -> list[Row]:
        """Time all providers in turn, and return their rows.

        Raises Interrupted at Ctrl-C; then :meth:`finish` still has what was measured.
        """
        try:
            self.record(interleave(self.ways, self.plan.effort, self.plan.device, unit=1e-9))
        except Interrupted as interrupted:
            self.record(interrupted.entries)
            raise
        return self.finish()

    def record(self, entries: Sequence[Entry]) -> None:
        """Add samples (in seconds) to the rows."""
        for entry in entries:
            row = self.rows[entry.name]
            row.samples_s += entry.samples
            row.faults = entry.faults
            if entry.host:
                row.host_s = statistics.summarise(entry.host).median
            if entry.failed:
                row.status, row.reason = FAILED, entry.note

    def finish(self) -> list[Row]:
        """The rows, with their statistics and the machine; frees the case."""
        after = machine.conditions()
        self.problem.close()
        environment = {
            **machine.describe(), "before": self.before, "after": after,
            "cpus taken by others": self.load.cpus(),
        }  # fmt: skip
        rows = list(self.rows.values())
        for row in rows:
            row.environment = environment
            if row.samples_s:
                summarise(row)
            elif row.status == MEASURED:
                row.status, row.reason = SKIPPED, "interrupted before its first sample"
        _shares(rows)
        self.ways, self.problem, self._sweep = [], Problem([]), None
        return rows


def summarise(row: Row) -> None:
    """Fill in what is read off the samples."""
    s = statistics.summarise(row.samples_s)
    row.median_s, row.q1_s, row.q3_s, row.outliers = s.median, s.q1, s.q3, s.outliers
    row.interval_s = list(statistics.median_interval(row.samples_s))


def _shares(rows: Sequence[Row]) -> None:
    """Bytes a second as a share of those of the bare pass beside it."""
    best = max(
        (r.bytes / r.median_s for r in rows if r.limit and r.bytes and r.median_s), default=0
    )
    for row in rows:
        if best and row.bytes and row.median_s:
            row.bandwidth_share = row.bytes / row.median_s / best


def run(case: Case, plan: Plan, threads: int, emit: Callable[[list[Row]], None]) -> None:
    """Measure one case; its rows go to ``emit``, also at Ctrl-C, which is raised after that."""
    group = Group(case, plan, threads)
    try:
        group.measure()
    except Interrupted:
        emit(group.finish())
        raise
    emit(list(group.rows.values()))
