"""The source package has what its tests read: five of them could not be imported without bench/."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_no_folder_that_tests_read_is_left_out() -> None:
    excluded = re.search(
        r"^sdist\.exclude = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert excluded
    left_out = set(re.findall(r'"/([\w.-]+)"', excluded[1]))
    read = {
        folder
        for path in (ROOT / "tests").rglob("*.py")
        for folder in re.findall(
            r'(?:ROOT|parents\[1\]|parent\.parent) / "(\w+)"', path.read_text()
        )
    }
    assert read >= {"bench", "python", "csrc"}
    assert left_out
    assert not read & left_out
