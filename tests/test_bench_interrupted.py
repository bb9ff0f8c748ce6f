"""What goes wrong amid a benchmark: what was measured until then is kept, and the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import run
from gpu import bench, family, ways
from gpu.problem import Case
from suite_settings import Settings
from test_bench_ab import Fake

from mbkern.bench import ab
from mbkern.bench import run as runs
from mbkern.bench.formulas import FORMULAS
from mbkern.bench.problem import Plan
from mbkern.bench.results import Entry, Group
from mbkern.bench.rows import load
from mbkern.bench.timing import Effort, Way


def test_the_suites_that_were_finished_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Entry("mbkern", [1e-3] * 8, correct=True)
    group = Group("host", "small", 1, "default", "s", "mbkern", [entry])

    def child(suite: str, settings: Settings) -> dict[str, object]:
        if suite == "tiers":
            raise KeyboardInterrupt
        return {"groups": [group.as_json()], "other_load": 0.0}

    monkeypatch.setattr(run, "_run_child", child)
    words = ["--suite", "host", "--suite", "tiers", "--suite", "memory"]
    written = tmp_path / "found.json"
    page = tmp_path / "found.md"
    assert run.main([*words, "--json", str(written), "--markdown", str(page)]) == 130
    document = json.loads(written.read_text())
    assert {g["suite"] for g in document["groups"]} == {"host"}
    (failure,) = document["failures"]
    assert failure.startswith("Interrupted: not measured: tiers (")
    assert "memory (" in failure
    shown = capsys.readouterr().out
    assert "small" in shown
    assert f"warning: {failure}" in shown
    assert failure in page.read_text()


def test_nothing_may_be_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def child(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_run_child", child)
    assert run.main(["--suite", "host"]) == 130
    assert "Interrupted: not measured: host (" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "mbkern in place"])
def test_a_way_that_raises_while_it_is_timed_says_why(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the GPU's suites: only its samples were taken over."""

    def interleaved(ways: list[Way], *_: object) -> list[Entry]:
        entries = [Entry(way.name, [1.0, 2.0], host=[0.5, 0.5]) for way in ways]
        for entry in entries:
            if entry.name == name:
                entry.samples, entry.host = [], []
                entry.fail(RuntimeError("out of memory\nmore"))
        return entries

    monkeypatch.setattr(family, "interleave", interleaved)
    monkeypatch.setattr(bench, "interleave", interleaved)
    dtype, effort = torch.float32, Effort(0.0, 0.0, 1, 1)
    case = Case("half_squared_error", 8, 8, dtype)
    makers = {k: ways.ELEMENTS[k] for k in (ways.IN_PLACE, ways.EAGER)}
    groups = [
        family.measure(FORMULAS["mse_loss"], (64,), dtype, effort, "cpu", repeated=2),
        bench.measure(case, makers, 12, effort, "cpu"),
    ]
    for group in groups:
        entry = group.entry(name)
        assert entry is not None
        assert entry.failed
        assert not entry.ranked
        assert "out of memory" in entry.note
        other = group.entry("copy")
        assert other is not None
        assert not other.failed


class Lasting(Fake):
    """One that does not end before Ctrl-C comes again."""

    def end(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt


def test_a_second_ctrl_c_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows were kept once the processes had ended."""
    monkeypatch.setattr(ab, "Session", Lasting)
    monkeypatch.setattr(Fake, "rounds", 0)
    monkeypatch.setattr(Fake, "last", 12)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    sides = [runs.Recorder(file, "pair") for file in files]
    with pytest.raises(KeyboardInterrupt):
        ab.run(Plan(("s",), repeats=6, warm_up=0.0), ("a", "b"), sides, processes=2)
    assert [len(row.samples_s) for file in files for row in load(file)[0]] == [3, 4]
