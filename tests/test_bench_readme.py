"""The numbers of the README are those of the committed measurements."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

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
