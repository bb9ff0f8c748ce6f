"""``python -m mbkern plan``: the script that it runs, and the files that it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mbkern._cli import main
from mbkern._plan_cli import _try_to_write

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

SCRIPT = """
import torch
def factory():
    net = torch.nn.Linear(8, 1)
    return (lambda x: net(x).sum()), torch.ones(4, 8)
number = 3
"""


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = ["plan", f"{script}:factory", "--batch", "4", "--seconds", "0.1"]
    files = [tmp_path / "plan.json", tmp_path / "plan.png"]
    pytest.importorskip("matplotlib")
    assert main([*words, "--json", str(files[0]), "--png", str(files[1])]) == 0
    assert capsys.readouterr().out.startswith("micro-batch")
    assert json.loads(files[0].read_text())["batch_size"] == 4
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--memory-limit", "1M"]) == 1
    assert "the limit is 1.0 MiB" in capsys.readouterr().err
    for wrong, message in (("none.py:factory", "no file"), (f"{script}:number", "no function")):
        assert main(["plan", wrong, "--batch", "4"]) == 2
        assert message in capsys.readouterr().err


WRONG = """
import torch
def raises():
    return broken()
def broken():
    raise KeyError("data")
def leaves():
    raise SystemExit("no data")
def nothing():
    pass
def three():
    return abs, torch.ones(4), 3
def no_step():
    return torch.ones(4), torch.ones(4)
def no_items():
    return abs, ["text"]
def with_argument(x):
    pass
def bad_step():
    return (lambda x: broken()), torch.ones(4, 8)
def no_loss():
    return (lambda x: 1.0), torch.ones(4, 8)
"""


@pytest.mark.parametrize(
    ("name", "status", "messages"),
    [
        ("raises", 2, ["script.py:raises raised:", "in broken", "KeyError: 'data'"]),
        ("leaves", 2, ["script.py:leaves raised:", "SystemExit: no data"]),
        ("nothing", 2, ["nothing must return (step, sample), not NoneType"]),
        ("three", 2, ["three must return (step, sample), not tuple of 3"]),
        ("no_step", 2, ["no_step must return a function as its step, not Tensor"]),
        ("no_items", 2, ["the sample of", "script.py:no_items: nothing to cut"]),
        ("with_argument", 2, ["missing 1 required positional argument: 'x'"]),
        ("bad_step", 1, ["script.py:bad_step raised:", "in broken", "KeyError: 'data'"]),
        ("no_loss", 1, ["mbkern plan: step must return the loss, a 0-dim tensor, not float"]),
    ],
)
def test_a_factory_that_is_wrong(
    name: str, status: int, messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user's own error with its place, and nothing of ours."""
    script = tmp_path / "script.py"
    script.write_text(WRONG)
    assert main(["plan", f"{script}:{name}", "--batch", "4", "--seconds", "0.1"]) == status
    error = capsys.readouterr().err
    assert error.startswith("mbkern plan: ")
    for message in messages:
        assert message in error
    assert "_plan" not in error.replace("mbkern_plan", "")
    assert "runpy" not in error


@pytest.mark.parametrize(
    ("text", "message"), [("1 +", "SyntaxError"), ("import none_such", "No module named")]
)
def test_a_script_that_is_wrong(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    assert main(["plan", f"{script}:factory", "--batch", "4"]) == 2
    error = capsys.readouterr().err
    assert f'File "{script}", line 1' in error
    assert message in error
    assert "runpy" not in error


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_outputs_are_checked_before_measuring(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('run')")
    words = ["plan", f"{script}:factory", "--batch", "4", option]
    for path, message in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "out", "No such file"),
        (script / "out", "Not a directory"),
    ):
        assert main([*words, str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"mbkern plan: cannot write {path}: {message}")


def test_outputs_stay_as_they_were_where_there_is_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, link = tmp_path / "script.py", tmp_path / "link"
    script.write_text(SCRIPT)
    link.symlink_to(tmp_path / "new")
    words = ["plan", f"{script}:factory", "--batch", "4", "--memory-limit", "1M", "--json"]
    for path in (tmp_path / "new", link):
        assert main([*words, str(path)]) == 1
        assert not path.exists()
    assert link.is_symlink()
    old = tmp_path / "old"
    old.write_text("of yesterday")
    assert main([*words, str(old)]) == 1
    assert old.read_text() == "of yesterday"
    assert "the limit is 1.0 MiB" in capsys.readouterr().err


def test_a_pipe_is_written_once(tmp_path: Path) -> None:
    """Its reader would take the end of a first try for the end of all."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    _try_to_write(pipe)  # without a reader: to open it would wait


def test_a_disk_that_is_full(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = ["plan", f"{script}:factory", "--batch", "1", "--seconds", "0.1"]
    assert main([*words, "--json", "/dev/full"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("micro-batch")
    assert "cannot write /dev/full: No space left" in captured.err


def test_no_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["plan", "none.py:factory", "--batch", "4", "--png", str(tmp_path / "out.png")]
    assert main(words) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
