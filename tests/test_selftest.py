"""`python -m mbkern selftest` passes here, and finds what it is there to find."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mbkern
from mbkern import _C, _selftest
from mbkern._selftest_cases import Case, Outputs
from mbkern._selftest_tiers import Tier

COMMAND = [sys.executable, "-m", "mbkern", "selftest"]


def test_it_passes_here() -> None:
    begin = time.perf_counter()
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every bit as it should be" in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.endswith("  ok")]
    losses = [[loss.name, str(d)[6:]] for loss in mbkern.losses() for d in _selftest.FORMATS]
    functions = [[f, t] for f in _C.elementary_functions() for t in ("float32", "float64")]
    others = ("linear_cross_entropy", "accumulation")
    wholes = [[name, str(d)[6:]] for name in others for d in _selftest.FORMATS]
    assert rows == losses + wholes + functions
    assert f"instruction sets: {', '.join(_C.isas())};" in done.stdout
    absent = [name for name in _selftest.TIERS if name not in _C.isas()]
    assert f"not available here: {', '.join(absent) or 'none'}" in done.stdout
    assert time.perf_counter() - begin < 240, "60 s are promised on two cores that are idle"


def test_the_golden_digests_are_of_this_version() -> None:
    content = json.loads(_selftest.GOLDEN.read_text())
    assert content["numerics_version"] == mbkern.NUMERICS_VERSION


@pytest.fixture(scope="module")
def digests() -> list[str]:
    """The text of a golden file of two small cases, once it is known."""
    return []


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: list[str]) -> Path:
    """The digests of two small cases of two losses, in a file of their own: all are run above."""
    small = [Case("a few rows", (5, 7)), Case("backward", (3, 70), "backward")]
    file = tmp_path / "golden.json"
    monkeypatch.setattr(_selftest, "GOLDEN", file)
    monkeypatch.setattr(_selftest, "cases", lambda kernel, dtype: small)
    for module, known in ((_selftest.head, "HEADS"), (_selftest.lists, "LISTS")):
        monkeypatch.setattr(module, known, getattr(module, known)[:1])
    few = [loss for loss in _selftest.losses() if loss.name in ("cross_entropy", "mse_loss")]
    monkeypatch.setattr(_selftest, "losses", lambda: few)
    monkeypatch.setattr(_selftest, "thread_counts", lambda: [1, 3])
    monkeypatch.setattr(_selftest._C, "elementary_functions", lambda: ["exp"])
    if not digests:
        assert _selftest.run(write_golden=True) == 0
        assert _selftest.run() == 0
        digests.append(file.read_text())
    file.write_text(digests[0])
    return file


def test_where_digests_are_written_is_said(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the installed package, where the next build takes them from nowhere."""
    capsys.readouterr()
    assert _selftest.run(write_golden=True) == 0
    assert capsys.readouterr().out.endswith(f"all runs agree; written: {golden}\n")


def change(file: Path, **replaced: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **replaced}))


@pytest.mark.parametrize(
    ("kernel", "dtype", "case"),
    [
        ("cross_entropy", "bfloat16", "backward"),
        ("cross_entropy", "float32", "bad targets"),
        ("mse_loss", "float64", "a few rows"),
        ("exp", "float32", "bit patterns"),
    ],
)
def test_a_flipped_bit_is_reported(
    kernel: str, dtype: str, case: str, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = json.loads(golden.read_text())["digests"]
    right = digests[kernel][dtype][case]
    wrong = f"{int(right, 16) ^ 1:032x}"
    digests[kernel][dtype][case] = wrong
    change(golden, digests=digests)
    capsys.readouterr()
    assert _selftest.run() == 1
    output = capsys.readouterr().out
    bad = [line.split()[:2] for line in output.splitlines() if line.endswith("DIFFERS")]
    assert bad == [[kernel, dtype]]
    assert f"  {case}: " in output
    assert f"agree on {right}, golden is {wrong}" in output
    assert "1 of the rows above differ" in output


def test_missing_and_stale_digests(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = json.loads(golden.read_text())["digests"]
    del digests["mse_loss"]["float16"]["backward"]
    digests["exp"]["float64"]["more patterns"] = "00"
    change(golden, digests=digests)
    assert _selftest.run() == 1
    output = capsys.readouterr().out
    assert "golden is missing" in output
    assert "more patterns: golden, but not a case" in output
    change(golden, digests={**digests, "no_such_loss": {}})
    assert _selftest.run() == 1
    assert "not in this build: no_such_loss" in capsys.readouterr().out


def test_on_cuda_alone_every_golden_kernel_is_run(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA's kernels in the build for tests, elsewhere the CPU's in their place: what is asked is
    which cases there are. The CPU refuses bad targets."""
    monkeypatch.setattr(_selftest, "find_tiers", lambda *_: [Tier("shim", on_cuda=True)])
    empty = _selftest.Finding("bad targets on CUDA")
    if not _C.cuda_is_shim():
        monkeypatch.setattr(_selftest, "check_bad_targets_on_cuda", lambda *_: empty)
    capsys.readouterr()
    assert _selftest.run(device="cuda") == 0, capsys.readouterr().out
    rows = {line.split()[0] for line in capsys.readouterr().out.splitlines() if " ok" in line}
    assert rows == set(json.loads(golden.read_text())["digests"])


@pytest.mark.gpu
@pytest.mark.usefixtures("device", "golden")
def test_on_cuda_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert _selftest.run(device="cuda") == 0, capsys.readouterr().out


def test_another_version(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(golden, numerics_version=mbkern.NUMERICS_VERSION + 1)
    assert _selftest.run() == 1
    assert f"are of numerics version {mbkern.NUMERICS_VERSION + 1}" in capsys.readouterr().out


def test_no_digests(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "{}", "[]"):
        golden.write_text(text)
        assert _selftest.run() == 1
        assert "cannot be read" in capsys.readouterr().out
    golden.unlink()
    assert _selftest.run() == 1
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["isa", "threads", "cut"])
def test_runs_that_differ_are_reported(
    where: str,
    golden: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One wrong bit on one ISA, with one number of threads, or in one cut; nothing is written."""
    right = _selftest.compute

    def wrong(*arguments: object) -> Outputs:
        outputs = right(*arguments)
        hit = {
            "isa": _C.isa() == "scalar",
            "threads": torch.get_num_threads() == 3,
            "cut": len(arguments[-1]) > 1,
        }
        if hit[where]:
            integers = _selftest.as_integers(outputs["gradient 0"])
            integers[2] ^= 1
        return outputs

    monkeypatch.setattr(_selftest, "compute", wrong)
    before, isa, threads = golden.read_text(), _C.isa(), torch.get_num_threads()
    for write in (False, True):
        assert _selftest.run(write_golden=write) == 1
        output = capsys.readouterr().out
        names = {"isa": "scalar, 1 threads, whole", "threads": ", 3 threads, whole"}
        assert f"{names.get(where, 'single items')}: gradient 0[2] is 0x" in output
    assert golden.read_text() == before
    assert (_C.isa(), torch.get_num_threads()) == (isa, threads)


def test_interrupted() -> None:
    """Ctrl-C is answered within 0.2 s; a machine at work gets a second."""
    with subprocess.Popen(
        [sys.executable, "-u", *COMMAND[1:]],
        stdout=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore the signal, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        while "kernel" not in process.stdout.readline():
            pass
        time.sleep(0.5)
        begin = time.perf_counter()
        process.send_signal(signal.SIGINT)
        while process.stdout.readline() not in ("interrupted\n", ""):
            pass
        elapsed = time.perf_counter() - begin
        assert process.wait() == 130
    assert elapsed < 1.0


INTERRUPTED_IN_EXEC = """
from mbkern import _cli, _selftest
_selftest._run = lambda *arguments: exec("raise KeyboardInterrupt")
print(_cli.main(["selftest"]))
"""


def test_interrupted_in_exec() -> None:
    """CPython would end the process by the signal, although the interrupt was handled: at the end
    of a module, as ``python -m`` has it, not in ``sys.exit`` of a command."""
    command = [sys.executable, "-c", INTERRUPTED_IN_EXEC]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\ninterrupted\n130\n", "")


# Without torch, which takes seconds to load.
ISA = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
print(_C.isa())
"""


def isa_with(value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MBKERN_ISA"}
    if value is not None:
        environment["MBKERN_ISA"] = value
    command = [sys.executable, "-I", "-c", ISA, _C.__file__]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_mbkern_isa() -> None:
    for name in _C.isas():
        assert isa_with(name).stdout == f"{name}\n"
    for default in (None, ""):
        assert isa_with(default).stdout == f"{_C.isas()[0]}\n"


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512 ", "scalar,avx2"])
def test_an_unknown_isa_is_an_error(name: str) -> None:
    done = isa_with(name)
    assert done.returncode == 1
    assert f"unknown ISA '{name}' (available: {', '.join(_C.isas())})" in done.stderr
    with pytest.raises(ValueError, match="unknown ISA"):
        _C.set_isa(name)


def test_an_unavailable_isa_is_an_error() -> None:
    absent = [name for name in _selftest.TIERS if name not in _C.isas()]
    if not absent:
        pytest.skip("NOT CHECKED: every instruction set is available on this machine")
    for name in absent:
        done = isa_with(name)
        assert done.returncode == 1
        assert f"ISA '{name}' (available: {', '.join(_C.isas())})" in done.stderr
