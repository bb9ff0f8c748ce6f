"""The check of ``make instructions``, as far as it goes without valgrind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import instructions  # noqa: E402


def test_a_dump_is_read() -> None:
    assert (
        instructions.read_dump("version: 1\nevents: Ir\nfn=(1)\n12 5\n\ntotals: 123456\n") == 123456
    )
    with pytest.raises(ValueError, match="without totals"):
        instructions.read_dump("version: 1\n")


def test_budgets_hold_or_are_named() -> None:
    budgets = {"a": 1000, "b": 2000}
    assert not instructions.over({"a": 1009, "b": 100}, budgets)
    (planted,) = instructions.over({"a": 1100, "b": 2000}, budgets)
    assert planted == "a: 1100 instructions, +10.0% of its budget"
    assert len(instructions.over({"a": 1000, "c": 5}, budgets)) == 2


def test_an_update_prints_the_change() -> None:
    found = instructions.changes({"a": 900, "c": 5}, {"a": 1000, "b": 1})
    assert found == ["a: 900 (-10.00% from 1000)", "c: 5 (new)", "b: gone"]


def test_what_cannot_be_checked_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "CMakeFiles" / "4.0"
    folder.mkdir(parents=True)
    program = tmp_path / "instructions"
    assert instructions.main([str(program)]) == 0
    assert "no compiler is named" in capsys.readouterr().out
    file = folder / "CMakeCXXCompiler.cmake"
    file.write_text('set(CMAKE_CXX_COMPILER_ID "Tiny")\nset(CMAKE_CXX_COMPILER_VERSION "3.1")\n')
    assert instructions.main([str(program)]) == 0
    assert "no budgets for Tiny 3" in capsys.readouterr().out
    known = next(iter(json.loads(instructions.BUDGETS.read_text())))
    monkeypatch.setattr(instructions, "compiler_of", lambda _: known)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert instructions.main([str(program)]) == 0
    assert "valgrind is not installed" in capsys.readouterr().out
