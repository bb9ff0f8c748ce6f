"""The numbers of the README are those of the committed measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import goal_page
import readme


def test_the_readme_says_what_was_measured() -> None:
    assert readme.main([]) == 0


def test_another_number_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "README.md"
    number = readme.current().splitlines()[-1].split("|")[2].strip()
    assert number
    lines = readme.current().splitlines()
    lines[-1] = lines[-1].replace(number, f"9{number}", 1)
    text = readme.README.read_text().replace(readme.current(), "\n".join(lines))
    changed.write_text(text)
    monkeypatch.setattr(readme, "README", changed)
    assert readme.main([]) == 1
    assert "--write" in capsys.readouterr().out
    assert readme.main(["--write"]) == 0
    assert readme.main([]) == 0
    changed.write_text("no markers")
    with pytest.raises(ValueError, match="needs one"):
        readme.main([])


def test_the_page_of_goals_says_what_was_measured() -> None:
    assert goal_page.main([]) == 0


def test_what_is_missed_is_bold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs take the place of what was there of their suites and machine, and of nothing else."""
    goals = [
        {"what": "speed", "reach": ">= 2x", "measured": f"{value}x (1-9)", "case": "c",
         "threads": threads, "allocator": "default"}
        for value, threads in ((2.5, 1), (3.0, 1), (1.9, 2), (12.0, 2))
    ]  # fmt: skip
    goals += [
        {**goals[0], "what": "price", "reach": "<= 1.05x", "measured": "1.05x (1.04-1.06)"},
        {**goals[0], "what": "bytes", "reach": "<= 0.5 MiB", "measured": "+0.70 MiB"},
        {**goals[0], "what": "unknown", "measured": "-"},
    ]
    facts = ("date", "cpus", "isa", "torch", "mbkern", "commit", "threads")
    run = {
        "machine": {"cpu": "first", **dict.fromkeys(facts, "2026-01-02T03")},
        "other_load": {"a (default)": 0.3, "b (default)": None},
        "goals": [{**goal, "suite": "twin"} for goal in goals],
    }
    monkeypatch.setattr(goal_page, "RESULTS", tmp_path / "goals.json")
    monkeypatch.setattr(goal_page, "PAGE", tmp_path / "speed.md")
    monkeypatch.setitem(goal_page.REASONS, "twin", ("the reason.",))
    for _ in range(2):
        (tmp_path / "run.json").write_text(json.dumps(run))
        assert goal_page.main(["--take", str(tmp_path / "run.json")]) == 0
        run["goals"][0]["measured"] = "2.40x"  # type: ignore[index]
    page = (tmp_path / "speed.md").read_text()
    assert "| what | aim | A, 1 thread | A, 2 threads |" in page
    assert "| speed, default | >= 2x | 2.40 to 3.00 | **1.90 to 12** |" in page
    assert "| price, default | <= 1.05x | 1.05 | - |" in page
    assert "| bytes, default | <= 0.5 MiB | **0.70** | - |" in page
    assert "| unknown, default | >= 2x | not measured | - |" in page
    assert "The machine was busy." in page
    assert "- Why: the reason." in page, "something is missed"
    assert goal_page.main([]) == 0
    (tmp_path / "speed.md").write_text(page.replace("2.40", "9.40"))
    assert goal_page.main([]) == 1
    assert "--write" in capsys.readouterr().out
    run["goals"] = [{**run["goals"][0], "measured": "9.00x"}]  # type: ignore[index]
    run["machine"]["cpu"] = "second"  # type: ignore[index]
    (tmp_path / "run.json").write_text(json.dumps(run))
    goal_page.main(["--take", str(tmp_path / "run.json")])
    page = (tmp_path / "speed.md").read_text()
    assert "| speed, default | >= 2x | 2.40 to 3.00 | **1.90 to 12** | 9.00 |" in page
    assert page.index("of an first") < page.index("of an second")
    run["machine"]["cpu"] = "first"  # type: ignore[index]
    (tmp_path / "run.json").write_text(json.dumps(run))
    goal_page.main(["--take", str(tmp_path / "run.json")])
    assert goal_page.main(["--write"]) == 0
    assert "Why" not in (tmp_path / "speed.md").read_text(), "nothing is missed"
