"""What documents name is there: files, links, the commands of make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
IN_USE = ("python", "csrc", "cmake", "tests", "examples", "bench", "docs")
MADE_UP = {"train.py"}  # the user's
LEFT_OUT = {"clean", "shim-native"}  # of the table of commands: a part of `make shim`


@pytest.fixture(scope="module")
def files() -> list[str]:
    """All files of the repository, by their paths in it."""
    found = [path for folder in IN_USE for path in (ROOT / folder).rglob("*") if path.is_file()]
    return ["/" + str(path.relative_to(ROOT)) for path in [*found, *ROOT.glob("*")]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links(page: Path, files: list[str]) -> None:
    """A name without a folder may be of any."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)", text)
    names = re.findall(r"(?<![*\w./-])[\w./-]+\.(?:pyi?|h|cpp|cuh?|md|json|txt|cmake)\b", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    missing += [
        name
        for name in sorted(set(names) - MADE_UP - set(links))
        if not any(file.endswith(f"/{name}") for file in files)
    ]
    assert not missing


def test_commands_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[0]
    named = re.findall(r"`make ([a-z\d-]+)[ `]", table)
    assert set(phony[1].split()) - LEFT_OUT == set(named)
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z\d-]+)", page.read_text())) <= set(phony[1].split())


def test_what_make_full_leaves_out() -> None:
    """The table said that it was everything that needs no GPU."""
    full = re.search(r"^full: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert full
    rows = (ROOT / "CONTRIBUTING.md").read_text().partition("| `make full` |")
    checks = set(re.findall(r"`make ([a-z\d-]+)[ `]", rows[0])) - {"demo", "bench", "bench-full"}
    said = set(re.findall(r"`make ([a-z\d-]+)`", rows[2].splitlines()[0]))
    assert checks - set(full[1].split()) == said
