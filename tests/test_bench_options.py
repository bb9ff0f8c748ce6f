"""Options of ``python -m mbkern bench`` that are empty, ask for nothing there is, or do nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mbkern.bench import cli, gpu, measure, run, suites
from mbkern.bench.formulas import FORMULAS
from mbkern.bench.loss_ways import loss_problem
from mbkern.bench.problem import Case, Plan, Problem
from mbkern.bench.rows import Row
from mbkern.bench.timing import Way

SUITE_FILE = str(Path(__file__).with_name("bench_suite.py"))
AB = ("ab", "--a", sys.executable, "--b", sys.executable)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--providers", ""), "--providers: '' names nothing"),
        (("--providers", " ,"), "--providers: ' ,' names nothing"),
        (("--allocators", ""), "--allocators: '' names nothing"),
        (("--directions", ","), "--directions: ',' names nothing"),
        (("compare", "a", "b", "--fail-if", ""), "'' is not of the form slower:5%"),
        ((*AB, "--fail-if", ""), "'' is not of the form slower:5%"),
        ((*AB, "--output-a", "x", "--output-b", "./x"), "would lie in one file, x"),
        (("all", "no_such_suite"), "unknown suite 'no_such_suite'"),
    ],
)
def test_an_empty_or_double_word_is_no_choice(
    words: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As from an empty variable of a shell: all was measured, and no rule failed anything."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        cli.main(words)
    assert ending.value.code == 2
    assert text in capsys.readouterr().err


def _row(provider: str, **facts: object) -> Row:
    row = Row("s", "c", [1], "float32", "both", provider, "cpu", "", 1, samples_s=[1.0] * 9)
    for name, value in facts.items():
        setattr(row, name, value)
    return row


def test_providers_that_there_are_none_of_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Limits are always measured, so that a slip of the pen was a success."""
    recorder = run.Recorder(None)
    recorder.add([_row("limit: bare pass", limit=True), _row("mbkern")])
    assert run.status(recorder, ("mbkern",)) == run.status(recorder) == 0
    assert run.status(recorder, ("limit",)) == 0
    assert not capsys.readouterr().err
    assert run.status(recorder, ("mbkern", "mbkrn")) == 0
    assert "no provider's name contains 'mbkrn'" in capsys.readouterr().err
    recorder.rows.pop()
    assert run.status(recorder, ("mbkrn",)) == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_suites_without_compile_do_not_ask_for_it() -> None:
    """``bench scaling --compile`` said that torch.compile was skipped: see --compile."""
    formula, shape = FORMULAS["mse_loss"], (8,)
    for plan in (Plan(), Plan(compile=True)):
        problem = loss_problem(formula, shape, "float32", plan)
        assert problem.skipped["torch.compile"] == "is not measured in this suite"
    problem = loss_problem(formula, shape, "float32", Plan(), compiled=True)
    assert problem.skipped["torch.compile"] == "see --compile"


def test_threads_of_a_gpu_are_not_dropped_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(cli, "_has_cuda", lambda: True)
    monkeypatch.setattr(run, "run", lambda plan, *_: plans.append(plan))
    for words in (["--threads", "2"], []):
        cli.main(["overhead", "--device", "cuda", *words])
        assert ("--threads is not used" in capsys.readouterr().err) == bool(words)
    assert [plan.threads for plan in plans] == [(1,), (1,)]


def test_all_and_a_suite_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was dropped; and a suite that is named twice was measured twice."""
    plans: list[Plan] = []
    monkeypatch.setattr(run, "run", lambda plan, *_: plans.append(plan))
    cli.main(["overhead", "all", "sleeping", "--suite-file", SUITE_FILE, "--threads", "1,1"])
    assert plans[0].suites == ("overhead", *(s for s in suites.SUITES if s != "overhead"),
                               "sleeping")  # fmt: skip
    assert plans[0].threads == (1,)


def _case(*ways: Way, **facts: object) -> Case:
    return Case("s", "c", (1,), "float32", lambda _: Problem(list(ways), **facts))  # type: ignore[arg-type]


def test_two_ways_of_one_name_do_not_share_their_samples() -> None:
    way = Way("mine", lambda: None)
    for case in (_case(way, way), _case(way, skipped={"mine": "not here"})):
        with pytest.raises(ValueError, match="two ways have the name 'mine'"):
            measure.Group(case, Plan(), 1)


def test_an_error_may_be_a_tensor() -> None:
    """What a check of one's own returned could not be written, and all cases were lost."""
    way = Way("mine", lambda: None, check=lambda _: torch.tensor(0.0))  # type: ignore[arg-type, return-value]
    (row,) = measure.Group(_case(way), Plan(repeats=1), 1).measure()
    assert row.error_vs_fp64 == 0.0
    assert '"error_vs_fp64": 0.0' in row.to_json()


def test_a_mistake_in_a_suite_is_no_reason_to_skip_it(tmp_path: Path) -> None:
    file = tmp_path / "suites.py"
    file.write_text("SUITES = {'mine': lambda plan: {}['x'], 'none': lambda plan: [][0]}")
    for name, error in (("mine", KeyError), ("none", IndexError)):
        with pytest.raises(error):
            suites.of(Plan((name,), suite_file=str(file)))


def test_a_reader_that_has_gone_is_no_failure_of_a_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a row of the file: failed, [Errno 32] Broken pipe."""

    def gone(*_: object) -> None:
        raise BrokenPipeError

    recorder = run.Recorder(None)
    monkeypatch.setattr(run, "_in_state", gone)
    with pytest.raises(BrokenPipeError):
        run.run(Plan(("s",)), ("default", "recycled"), recorder)
    assert not recorder.rows


@pytest.mark.parametrize("shown", [None, "3"])
def test_sensors_are_those_of_the_gpu_that_is_used(
    shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's first GPU is nvidia-smi's fourth where CUDA_VISIBLE_DEVICES says so."""
    asked: list[str] = []

    def answer(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command[-1])
        if asked[-1] == "--id=GPU-12ab":
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout=", ".join(map(str, range(len(gpu.QUERY)))) + "\n")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(uuid="34cd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(gpu.subprocess, "run", answer)
    assert gpu.sensors()["driver"] == "0"
    assert asked == ["--id=GPU-34cd"]
    properties.uuid = "12ab"
    assert bool(gpu.sensors()) == (shown is None)
    assert asked[1:] == ["--id=GPU-12ab", *["--id=0"] * (shown is None)]
