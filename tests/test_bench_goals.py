"""``bench/run.py`` and what is said of its runs: what is wrong, has raised, or is not full."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import ab_check
import goal_page
import goals
import planner
import report
import run
import spread
from suite_settings import NONE, Settings
from suites import family, head

from mbkern.bench.formulas import FORMULAS
from mbkern.bench.results import Entry, Group

SETTINGS = Settings("default", (1,), True, 2, NONE)


def _group(*entries: Entry) -> Group:
    return Group("s", "c", 1, "default", "ms", "torch", list(entries))


def _goal(difference: str = "") -> goals.Goal:
    return goals.Goal("g", "s", "torch", "mbkern", 2.0, lambda _: True, not difference, difference)


@pytest.mark.parametrize("difference", ["", "MiB"])
def test_what_has_raised_or_is_wrong_meets_no_goal(difference: str) -> None:
    """Five rounds before a way raised were a ratio, and the run a success."""
    fast, raised, wrong = (Entry("mbkern", [1.0] * 5) for _ in range(3))
    raised.fail(ValueError("broke"))
    wrong.correct = False
    torch_ = Entry("torch", [3.0] * 9)
    for ours, passed, said in (
        (fast, True, ""), (raised, False, "mbkern has failed"), (wrong, False, "mbkern is wrong"),
    ):  # fmt: skip
        (verdict,) = goals.judge([_group(torch_, ours)], [_goal(difference)])
        assert verdict.passed is passed
        assert said in verdict.measured
    document = {"other_load": {}, "load": [0.0, 0.0], "failures": []}
    cautions = report.warnings(document, [_group(torch_, raised)])
    assert "Failed, not ranked: mbkern at c." in cautions
    (_, row) = report.suite_table("s", [_group(torch_, raised)]).rows
    assert "FAILED" in row
    (unmeasured,) = goals.judge([_group(torch_, Entry("mbkern"))], [_goal(difference)])
    assert unmeasured.passed is None


@pytest.mark.parametrize("raises", [False, True])
def test_a_way_that_raises_fails_the_run(raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("torch", [1.0] * 9)
    if raises:
        entry.fail(ValueError("broke"))
    data = {"groups": [_group(entry).as_json()], "other_load": None}
    monkeypatch.setattr(run, "_run_child", lambda *_: data)
    assert run.main(["--suite", "host"]) == int(raises)


def test_no_number_is_no_small_error() -> None:
    """``max(1e-7, nan)`` is 1e-7: a gradient of NaN was right."""
    one, nan = torch.ones(3), torch.full((3,), float("nan"))
    exact = (torch.ones(()).double(), one.double())
    for result in ((one[0], nan), (nan[0], one)):
        error = family._error(result, exact)
        assert error != error
    assert family._error((one[0], one), exact) == 0.0


def test_every_way_of_a_loss_is_checked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place had the error of autograd, and split-invariant heads that of others."""
    right = family._in_place
    monkeypatch.setattr(family, "_in_place", lambda *given: [2 * t for t in right(*given)])
    group = family._large("elements", FORMULAS["mse_loss"], (64,), torch.float32, 1, SETTINGS)
    assert {e.name: e.correct for e in group.entries} == {
        "torch": True, "mbkern autograd": True, "mbkern in place": False, "limit: bare pass": True,
    }  # fmt: skip
    small = family._small(FORMULAS["mse_loss"], SETTINGS)
    assert [len(e.samples) for e in small.entries] == [2, 2]
    assert all(e.correct and e.error is not None for e in small.entries)
    through = head.Problem.through

    def doubled(self: head.Problem, *given: object, **options: object) -> torch.Tensor:
        return through(self, *given, **options) * (2 if "split_invariant" in options else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(head.Problem, "through", doubled)
    found = head._time((40, 8, 100), torch.float32, SETTINGS)
    wrong = [e.name for e in found.entries if not e.correct]
    assert wrong
    assert all("into a buffer, split-invariant" in name for name in wrong)


def _taken(folder: Path, monkeypatch: pytest.MonkeyPatch, **facts: object) -> Path:
    names = ("date", "cpu", "cpus", "isa", "torch", "mbkern", "commit", "threads")
    goal = {"what": "price", "reach": "<= 1.05x", "measured": "1.05x (1.04-1.06)", "suite": "twin",
            "case": "c", "threads": 1, "allocator": "default"}  # fmt: skip
    document = {
        "machine": dict.fromkeys(names, "2026-01-02T03"), "other_load": {}, "goals": [goal | facts],
        "command": facts.get("command", ""),
    }  # fmt: skip
    monkeypatch.setattr(goal_page, "RESULTS", folder / "goals.json")
    monkeypatch.setattr(goal_page, "PAGE", folder / "speed.md")
    path = folder / "run.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("verdict", "cell"), [("FAIL (within noise)", "**1.05**"), ("pass", "1.05")]
)
def test_a_goal_is_missed_by_what_was_measured_and_not_by_its_digits(
    verdict: str, cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.0549 is more than 1.05, and was reached as 1.05."""
    path = _taken(tmp_path, monkeypatch, verdict=verdict)
    assert goal_page.main(["--take", str(path)]) == 0
    assert f"| price, default | <= 1.05x | {cell} |" in (tmp_path / "speed.md").read_text()


def test_a_quick_run_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _taken(tmp_path, monkeypatch, command="python bench/run.py --quick")
    with pytest.raises(SystemExit):
        goal_page.main(["--take", str(path)])
    assert "is of --quick" in capsys.readouterr().err
    assert not (tmp_path / "goals.json").exists()


@pytest.mark.parametrize(
    ("main", "words", "text"),
    [
        (run.main, ("--repeats", "0"), "--repeats: '0' is no number of 1 or more"),
        (run.main, ("--threads", "1,0"), "--threads: '0' is no number of 1 or more"),
        (run.main, ("--json", "/no/file"), "cannot write /no/file: No such file"),
        (run.main, ("--markdown", "/no/file"), "cannot write /no/file: No such file"),
        (spread.main, ("--passes", "0"), "--passes: '0' is no number of 1 or more"),
        (spread.main, ("--output", "/no/file"), "cannot write /no/file: No such file"),
        (ab_check.main, ("--times", "0"), "--times: '0' is no number of 1 or more"),
        (ab_check.main, ("--output", "/no/file"), "cannot write /no/file: No such file"),
        (planner.main, ("--threads", "0"), "--threads: '0' is no number of 1 or more"),
        (planner.main, ("--seconds", "nan"), "--seconds: 'nan' is no time above 0"),
        (planner.main, ("--output", "/no/file"), "cannot write /no/file: No such file"),
    ],
)
def test_options_are_read_before_anything_is_measured(
    main: object, words: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Minutes later there was a traceback, or a result of nothing."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as ending:
        main() if main is planner.main else main(list(words))  # type: ignore[operator]
    assert ending.value.code == 2
    assert text in capsys.readouterr().err
