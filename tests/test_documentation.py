"""What the documents promise is tried: the README's examples, its environment variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(example: str) -> None:
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})


def test_every_environment_variable_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README, re.MULTILINE)
    table = set(re.findall(r"\w+", " ".join(rows)))
    sources = [
        ROOT / "CMakeLists.txt",
        *(ROOT / "cmake").glob("*.cmake"),
        ROOT / "pyproject.toml",
        *(ROOT / "csrc").rglob("*.cpp"),
        *(ROOT / "csrc").rglob("*.cu"),
        *(ROOT / "python").rglob("*.py"),
    ]
    read = re.compile(
        r"getenv\(\"(\w+)\"|environ[.\[(getenv]*\"(\w+)\"|\{ env = \"(\w+)\"|\$ENV\{(\w+)\}"
        r"|\b(CXX|CUDACXX|CUDAHOSTCXX)\b"  # CMake reads these by itself: our messages name them
    )
    found = {name for s in sources for names in read.findall(s.read_text()) for name in names}
    assert found - {""} <= table
    assert found >= {"MBKERN_ISA", "CUDAFLAGS", "CUDAARCHS", "CUDACXX", "CUDAHOSTCXX"}


def test_every_suite_of_the_goals_is_in_the_table() -> None:
    """The fused head and the way through torch.compile were left out."""
    page = (ROOT / "bench" / "README.md").read_text().partition("### What is measured")[2]
    table = re.findall(r"^\| `([\w-]+)` \|", page.partition("## How")[0], re.MULTILINE)
    program = (ROOT / "bench" / "run.py").read_text()
    known = re.search(r"^SUITES\b[^{(\[]*[{(\[](.*?)^[})\]]", program, re.MULTILINE | re.DOTALL)
    assert known
    assert table == re.findall(r'^    "([\w-]+)"', known[1], re.MULTILINE)
