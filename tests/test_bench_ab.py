"""``bench ab`` and its workers: where they start, what Ctrl-C leaves, whom others are."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mbkern.bench import ab, cli, compare, machine, run
from mbkern.bench.problem import Plan
from mbkern.bench.rows import MEASURED, SKIPPED, Row, load
from mbkern.bench.session import Session
from mbkern.bench.worker import Worker

SUITE_FILE = str(Path(__file__).with_name("bench_suite.py"))


def _ab(folder: Path, a: str, *words: str) -> tuple[int, list[list[Row]]]:
    files = [folder / name for name in ("a.jsonl", "b.jsonl")]
    status = cli.main(
        ["ab", "--a", a, "--b", sys.executable, "sleeping", "--suite-file", SUITE_FILE, "--threads",
         "1", "--repeats", "4", "--processes", "1", "--short", "--output-a", str(files[0]),
         "--output-b", str(files[1]), *words]
    )  # fmt: skip
    return status, [load(path)[0] for path in files]


def test_interpreters_may_be_relative_and_no_folder_hides_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of bench/README.md could not be run; beside a folder mbkern both would be it."""
    python = tmp_path / "old" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "mbkern").mkdir()
    (tmp_path / "mbkern" / "__init__.py").write_text("raise ImportError('of this folder')\n")
    monkeypatch.chdir(tmp_path)
    status, (old, new) = _ab(tmp_path, "old/python", "--allocators", "default,recycled")
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "A and B are one build" in said.err
    for rows in (old, new):
        assert [row.allocator for row in rows] == ["default", "recycled"], "--allocators is used"
        assert all(row.blocks == [4] for row in rows)
        assert all(row.environment["cpus taken by others"] is not None for row in rows)


class Fake:
    """A worker that is interrupted in the round of that number, counted over all workers."""

    died = False
    skipped: ClassVar[dict[str, str]] = {}
    cases = (("s", "c", "float32", "both", "1"),)
    rounds = 0
    last = 10**9

    def __init__(self, *_: object) -> None:
        self.interrupted = False
        self.pid = os.getpid()
        self.samples: list[float] = []

    def ask(self, what: str, **arguments: Any) -> list[Row]:
        if what == "round" and not self.interrupted:
            Fake.rounds += 1
            self.interrupted = Fake.rounds >= Fake.last
            if arguments.get("record", True) and not self.interrupted:
                self.samples.append(1e-3)
        if what != "close":
            return []
        row = Row("s", "c", [1], "float32", "both", "mbkern", "cpu", "", 1)
        row.samples_s = self.samples
        if not self.samples:
            row.status, row.reason = SKIPPED, "interrupted before its first sample"
        return [row]

    def rows(self, answer: list[Row]) -> list[Row]:
        return answer

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("last", "kept"),
    [(9, ([3, 0], [3, 0])), (11, ([3, 0], [3, 0])), (12, ([3, 0], [3, 1])), (14, ([3, 2], [3, 1]))],
)
def test_ctrl_c_leaves_what_earlier_processes_measured(
    last: int, kept: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was skipped, or compared as if all samples were of one process."""
    monkeypatch.setattr(ab, "Session", Fake)
    monkeypatch.setattr(Fake, "rounds", 0)
    monkeypatch.setattr(Fake, "last", last)
    sides = [run.Recorder(None, "pair"), run.Recorder(None, "pair")]
    ab.run(Plan(("s",), repeats=6, warm_up=0.0), ("a", "b"), sides, processes=2)
    assert all(side.interrupted for side in sides)
    (old,), (new,) = (side.rows for side in sides)
    assert (old.status, new.status) == (MEASURED, MEASURED)
    assert sorted((old.blocks, new.blocks)) == sorted(kept)
    (found,) = compare.compare([old], [new], 0.05)
    assert compare.took_turns(old, new)
    assert found.ratio is not None
    assert found.ratio.n == 3 + min(old.blocks[1], new.blocks[1])


def test_the_twin_is_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a CPU was said to be taken by others, which was the other build's half."""
    given: list[list[int]] = []

    class Load:
        def __init__(self, processes: list[int] = []) -> None:  # noqa: B006
            given.append(list(processes))

        def cpus(self) -> float:
            return 0.25

    monkeypatch.setattr(ab, "Session", Fake)
    monkeypatch.setattr(machine, "OtherLoad", Load)
    sides = [run.Recorder(None, "pair"), run.Recorder(None, "pair")]
    ab.run(Plan(("s",), repeats=2, warm_up=0.0), ("a", "b"), sides, processes=1)
    assert [os.getpid()] * 2 in given
    assert all(side.rows[0].environment["cpus taken by others"] == 0.25 for side in sides)


def test_time_of_a_worker_is_told_from_that_of_others() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert machine._own_seconds([child.pid]) - machine._own_seconds() >= 0.2
        child.communicate(b"\n")
    assert machine._own_seconds([child.pid]) - machine._own_seconds() <= 0.0, "it is gone"


def test_no_garbage_is_collected_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    worker = Worker(io.StringIO())
    worker.plan(Plan(("sleeping",), suite_file=SUITE_FILE).to_json())
    try:
        worker.open(0)
        assert not gc.isenabled()
        worker.round()
        worker.close()
        assert gc.isenabled()
    finally:
        gc.enable()


def test_an_interrupt_after_the_answer_ends_nothing() -> None:
    """The worker died of it, and with it what it had measured."""
    session = Session(Plan(("sleeping",), suite_file=SUITE_FILE))
    try:
        session.ask("open", index=0)
        session.ask("round")
        os.kill(session.pid, signal.SIGINT)
        (row,) = session.rows(session.ask("close"))
    finally:
        session.end()
    assert len(row.samples_s) == 1
