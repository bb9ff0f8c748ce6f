"""``python -m mbkern doctor`` as a whole, and what is said where there is nothing to look at."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mbkern
from mbkern import _C, _cli
from mbkern._doctor import runs_on

SOURCES = Path(__file__).resolve().parents[1] / "python" / "mbkern"
SECTIONS = ["versions", "instruction set", "threads", "huge pages", "cuda", "warnings"]


def run_python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MBKERN_ISA"} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_report(tmp_path: Path) -> None:
    done = run_python(tmp_path, "-m", "mbkern", "doctor")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == SECTIONS
    facts = dict(re.findall(r"^  (\w+(?: \w+)*)  +(.+)$", done.stdout, re.MULTILINE))
    assert facts["mbkern"] == mbkern.__version__
    assert facts["numerics"] == str(mbkern.NUMERICS_VERSION)
    assert facts["torch"] == torch.__version__
    assert facts["available"].split(", ") == _C.isas()
    assert facts["because"] == "best available"
    assert facts["commit"] == (_C.build_info()["git"] or "unknown")
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", facts["commit"])


def test_json(tmp_path: Path) -> None:
    """The same facts; advice is no failure."""
    slow = {"MBKERN_ISA": "scalar"}
    done = run_python(tmp_path, "-m", "mbkern", "doctor", "--json", **slow)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == SECTIONS
    assert report["versions"]["commit"] == (_C.build_info()["git"] or "unknown")
    isa = {"used": "scalar", "because": "MBKERN_ISA=scalar", "available": _C.isas()}
    assert report["instruction set"] == isa
    advised = any("unset MBKERN_ISA" in text for text in report["warnings"])
    assert advised == (_C.isas() != ["scalar"])
    text = run_python(tmp_path, "-m", "mbkern", "doctor", **slow).stdout
    for name in SECTIONS[:-1]:
        for fact in report[name]:
            assert re.search(rf"^  {re.escape(fact)} ", text, re.MULTILINE), fact


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _cli.main(["--version"])
    assert ended.value.code == 0
    told = f"mbkern {mbkern.__version__}, numerics version {mbkern.NUMERICS_VERSION}\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("words", ["doctor", "selftest", "plan", "bench", "bench ab",
                                   "bench compare", "bench report"])  # fmt: skip
def test_every_option_is_explained(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option stood alone in its line of --help."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        _cli.main([*words.split(), "--help"])
    options = capsys.readouterr().out.split("options:\n")[1].split("\n\n")[0]
    joined = re.sub(
        r"\n {20,}", "   ", options
    )  # the help of a long option begins in the next line
    for line in joined.splitlines():
        assert re.match(r"  -.*\S   *\w", line), line


def test_an_unknown_option(tmp_path: Path) -> None:
    done = run_python(tmp_path, "-m", "mbkern", "doctor", "--yaml")
    assert done.returncode == 2
    assert "--yaml" in done.stderr


def test_no_extension(tmp_path: Path) -> None:
    """A source tree is imported: cause and cure are named, by the doctor's command, too."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(SOURCES, tmp_path / "mbkern", ignore=ignored)
    for arguments in (("-c", "import mbkern"), ("-m", "mbkern", "doctor")):
        done = run_python(tmp_path, *arguments, PYTHONPATH=str(tmp_path))
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: mbkern: the compiled module mbkern._C cannot be load")
        assert "Cause: the package is imported from its source tree" in last
        assert "Cure: leave the source directory and run `pip install .`" in last


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    """As in ``python -m mbkern doctor | head -1``."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mbkern", "doctor"],
            stdout=write, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(("archs", "capability", "runs"), [
    ("90a-real", (9, 0), True), ("90a-virtual", (10, 0), False), ("90a", (12, 0), False),
    ("100f-real", (10, 3), True), ("100f-virtual", (12, 0), False), ("100f", (10, 0), True),
    ("90a 80-virtual", (10, 0), True), ("native", (9, 0), True), ("all-major", (12, 0), True),
])  # fmt: skip
def test_architectures_of_one_gpu_and_words(
    archs: str, capability: tuple[int, int], runs: bool
) -> None:
    """PTX of 90a runs on no newer GPU; and what ``native`` was, nobody knows any more."""
    assert runs_on(archs, capability) == runs
