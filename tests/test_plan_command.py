"""``python -m mbkern plan`` with scripts, options and files that are not as they should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbkern import _C, _cli
from mbkern._cli import main

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

SCRIPT = """
from __future__ import annotations
import dataclasses, pickle, sys, torch
from dataclasses import InitVar, dataclass
weight = torch.ones(4, requires_grad=True)
@dataclass
class Batch:
    x: torch.Tensor
def of_a_class():
    @dataclass
    class Local:
        x: torch.Tensor
        start: InitVar[int] = 0
    batch = pickle.loads(pickle.dumps(Batch(torch.ones(4, 4))))
    return (lambda b: (weight * b.x).sum()), Local(batch.x)
def step_leaves():
    return (lambda x: sys.exit(0)), torch.ones(4, 4)
def sample_leaves():
    return abs, lambda n: sys.exit(0)
def no_items():
    return abs, torch.ones(0, 4)
def interrupted():
    def step(x):
        raise KeyboardInterrupt
    return step, torch.ones(4, 4)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "script.py"
    path.write_text(SCRIPT)
    return path


def run(*words: object) -> int:
    """The exit status, also where argparse ends the program."""
    try:
        return main(["plan", *map(str, words)])
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("of_a_class", 0, ""),
        ("step_leaves", 1, "step_leaves raised:"),
        ("sample_leaves", 1, "sample_leaves raised:"),
        ("no_items", 2, "no_items: the sample has no items"),
        ("interrupted", 130, "interrupted\n"),
    ],
)
def test_factories(
    name: str, status: int, message: str, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that left with status 0 looked like a plan; classes of the script had no module."""
    assert run(f"{script}:{name}", "--batch", 4, "--seconds", 0.02) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out.startswith("micro-batch") == (status == 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "argument --batch: '0' is no number"),
        (["--batch", "1" * 5000], "argument --batch: "),
        (["--batch", "4", "--memory-limit", "9" * 400], "argument --memory-limit: "),
        (["--batch", "4", "--memory-limit", "-1G"], "argument --memory-limit: "),
        (["--batch", "4", "--seconds", "nan"], "argument --seconds: 'nan'"),
        (["--batch", "4", "--seconds", "-1"], "argument --seconds: '-1'"),
        (["--batch", "4", "--noise-scale", "0"], "argument --noise-scale: "),
        (["--batch", "4", "--noise-scale", "inf"], "argument --noise-scale: 'inf'"),
        (["--batch", "4", "--json", "out", "--png", "./out"], "are one file"),
    ],
)
def test_options_are_read_before_the_script(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text("raise AssertionError('run')")
    assert run("script.py:factory", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [("script.py", "'script.py' names no factory"), ("a" * 5000 + ":f", "no file 'aaa")],
)
def test_no_script(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words, "--batch", 4) == 2
    assert capsys.readouterr().err.startswith(f"mbkern plan: {message}")


def test_every_command_is_interrupted_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(_cli, "_run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_instruction_set_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The doctor, which is asked then, raised as well; the self-test says why it does not start."""

    def isa() -> str:  # as with the variable from the start
        raise ValueError("mbkern: unknown ISA 'none_such'")

    monkeypatch.setenv("MBKERN_ISA", "none_such")
    monkeypatch.setattr(_C, "isa", isa)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "there is no instruction set 'none_such' here: unset MBKERN_ISA." in said
    assert main(["selftest"]) == 1
    assert capsys.readouterr().err == "mbkern: unknown ISA 'none_such'\n"
