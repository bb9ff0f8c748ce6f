"""``python -m mbkern bench`` itself: is a known time found, is what is wrong shown as wrong?"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_suite import SLEEP

from mbkern.bench import cli, run
from mbkern.bench.formulas import FORMULAS
from mbkern.bench.problem import Plan
from mbkern.bench.rows import FAILED, MEASURED, SKIPPED, WRONG, Row, load
from mbkern.bench.session import Session
from mbkern.bench.timing import Effort, Way, interleave, once

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import ab_check
import spread

SUITE_FILE = str(Path(__file__).with_name("bench_suite.py"))
FIELDS = (
    "suite", "case", "shape", "dtype", "direction", "provider", "device", "isa", "threads",
    "median_s", "interval_s", "samples_s", "bytes", "error_vs_fp64", "peak_bytes", "environment",
)  # fmt: skip


def _bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mbkern", "bench", *words],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def _fakes(suite: str, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return _bench(
        suite, "--suite-file", SUITE_FILE, "--allocators", "default", "--threads", "1",
        "--output", str(output), *words,
    )  # fmt: skip


def test_a_known_time_is_measured(tmp_path: Path) -> None:
    """Within 2 %: a sleep is late by some 0.1 ms itself, which is taken off."""
    late = []
    for _ in range(25):
        start = time.perf_counter()
        time.sleep(SLEEP)
        late.append(time.perf_counter() - start - SLEEP)
    done = _fakes("sleeping", tmp_path / "rows.jsonl", "--repeats", "25")
    assert done.returncode == 0, done.stderr
    ((row,), warnings) = load(tmp_path / "rows.jsonl")
    assert not warnings
    assert row.median_s is not None
    assert abs(row.median_s - statistics.median(late) - SLEEP) < 0.02 * SLEEP
    assert row.interval_s is not None
    assert row.interval_s[0] <= row.median_s <= row.interval_s[1]
    assert len(row.samples_s) == 25
    assert all(hasattr(row, name) for name in FIELDS)
    assert {"cpu", "torch", "governor", "before", "after", "commit"} <= set(row.environment)


def test_the_harness_costs_a_microsecond_a_sample() -> None:
    """What it adds to a time, at the least: others may take the CPU meanwhile."""
    way = Way("nothing", lambda: None)
    assert min(once(way)[0] for _ in range(2000)) <= 1000


def test_what_is_wrong_or_raises_or_dies_is_shown_and_the_run_goes_on(tmp_path: Path) -> None:
    done = _fakes("mixed", tmp_path / "rows.jsonl", "--repeats", "9")
    assert done.returncode == 1, done.stderr
    rows = load(tmp_path / "rows.jsonl")[0]
    found = {(r.case, r.provider): r for r in rows}
    assert found["broken", "(all)"].reason == "MemoryError: too large"
    assert "SIGKILL" in found["killed", "(all)"].reason
    states = {r.provider: r.status for r in rows if r.case == "mixed"}
    assert states == {
        "torch": MEASURED, "wrong": WRONG, "nan": WRONG, "raises": FAILED, "raises later": FAILED,
        "good": MEASURED, "absent": SKIPPED,
    }  # fmt: skip
    assert found["mixed", "raises"].reason == "RuntimeError: no such kernel"
    assert len(found["mixed", "good"].samples_s) == 9
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "WRONG" in lines["wrong"]
    assert "x (" not in lines["wrong"]  # not ranked
    assert "x (" in lines["good"]
    assert "skipped: absent: not installed" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no terminal, no colours


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "mbkern", "bench", "overhead", "sleeping", "--suite-file",
         SUITE_FILE, "--allocators", "default", "--threads", "1", "--seconds", "30",
         "--providers", "mbkern", "--output", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Background jobs of a shell ignore the signal, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stdout is not None
    assert "[1/" in process.stderr.readline()
    time.sleep(3.0)
    process.send_signal(signal.SIGINT)
    shown = process.stdout.read()
    assert process.wait(timeout=30) == 130
    rows = load(output)[0]
    process.stderr.close()
    process.stdout.close()
    assert rows
    assert rows[0].samples_s
    assert rows[0].provider in shown


def test_a_way_that_raises_leaves_the_others_their_turns() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    entries = interleave([Way("a", lambda: None), Way("b", fail)], Effort(0.0, 0.0, least=3))
    assert len(entries[0].samples) == 3
    assert entries[1].failed
    assert entries[1].note == "RuntimeError: no"


def test_the_suites_are_right_and_complete(tmp_path: Path) -> None:
    """Every kind of way, at tiny effort: correct, with its bytes, memory, and instruction set."""
    path = tmp_path / "rows.jsonl"
    done = _bench(
        "cross_entropy", "overhead", "accumulate", "--short", "--model", "imagenet", "--repeats",
        "2", "--allocators", "default,recycled", "--threads", "1", "--output", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = load(path)[0]
    timed = [r for r in rows if r.status == MEASURED]
    assert all(r.error_vs_fp64 is not None for r in timed if not r.limit)
    assert {r.allocator for r in timed} == {"default", "recycled"}
    ours = [r for r in timed if r.provider.startswith("mbkern in place")]
    assert len({r.isa for r in ours}) == len(ours) / 2
    assert all(r.bytes and r.bandwidth_share for r in ours)
    assert any(r.limit and "exp" in r.provider for r in timed)
    assert all(r.reason for r in rows if r.status == SKIPPED)


def test_two_builds_take_turns_and_a_planted_slowdown_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "python-slow"
    slow.write_text(f'#!/bin/sh\nMBKERN_TEST_SLOWER=1.3 exec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    done = _bench(
        "ab", "--a", sys.executable, "--b", str(slow), "slower", "--suite-file", SUITE_FILE,
        "--threads", "1", "--repeats", "40", "--processes", "1", "--fail-if", "slower:5%",
        "--output-a", files[0], "--output-b", files[1],
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "SLOWER" in done.stdout
    assert cli.main(["compare", *files, "--fail-if", "slower:5%"]) == 1
    assert cli.main(["compare", *files, "--fail-if", "slower:60%"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", *reversed(files), "--fail-if", "slower:5%"]) == 0
    assert "1 FASTER" in capsys.readouterr().out
    rows: list[list[Row]] = [load(Path(f))[0] for f in files]
    assert rows[0][0].pair == rows[1][0].pair != ""


def _losing(folder: Path, side: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """``bench ab`` where one of two builds has lost something."""
    python = folder / "python-losing"
    python.write_text(f'#!/bin/sh\nMBKERN_TEST_LOSES=1 exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    builds = {"a": sys.executable, "b": sys.executable, side: str(python)}
    files = [str(folder / name) for name in ("a.jsonl", "b.jsonl")]
    done = _bench(
        "ab", "--a", builds["a"], "--b", builds["b"], "losing", "leaving", "--suite-file",
        SUITE_FILE, "--threads", "1", "--repeats", "6", "--processes", "2", "--fail-if",
        "slower:900%", "--output-a", files[0], "--output-b", files[1],
    )  # fmt: skip
    return done, files


LOST = (
    ("raising", "measured in A, failed in B (MemoryError: too large)"),
    ("dying", "measured in A, failed in B (the measuring process was ended by SIGKILL)"),
    ("poorer", "only in A"),
    ("sleeping", "only in A"),
    ("left", "measured in A, skipped in B (this build has none)"),
)


def test_what_the_second_build_has_lost_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, files = _losing(tmp_path, "b")
    assert "Traceback" not in done.stderr
    assert cli.main(["compare", *files, "--fail-if", "slower:900%"]) == done.returncode == 1
    for shown in (done.stdout, capsys.readouterr().out):
        lines = [line for line in shown.splitlines() if "not compared: " in line]
        found = [(line.split()[1], line.split("not compared: ")[1]) for line in lines]
        assert sorted(found) == sorted(LOST)
        assert "A has a time, and B has none: 5" in shown
    kept = [r for r in load(Path(files[1]))[0] if (r.case, r.provider) == ("slower", "mbkern")]
    assert [r.blocks for r in kept] == [[3, 3]]


def test_what_only_the_second_build_has_is_named_and_is_no_failure(tmp_path: Path) -> None:
    done, _ = _losing(tmp_path, "a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("not compared: only in B") == 2
    assert done.stdout.count("not compared: failed in A") == 2


def test_two_builds_with_one_thread_share_a_cpu() -> None:
    cpus = os.sched_getaffinity(0)
    session = Session(Plan(("sleeping",), threads=(1, 2, 1), suite_file=SUITE_FILE))
    seen = []
    try:
        for index in range(3):
            session.ask("open", index=index)
            seen.append(os.sched_getaffinity(session.pid))
            session.ask("close")
    finally:
        session.end()
    assert seen == [{min(cpus)}, cpus, {min(cpus)}]


def test_the_slowdown_of_the_check_is_planted(tmp_path: Path) -> None:
    """``bench/ab_check.py`` says how often ``bench ab`` finds it; that takes 25 minutes."""
    compare = (
        "import torch, mbkern; from mbkern._loss_and_grad import loss_and_grad; "
        "call = ('cross_entropy', torch.randn(64, 1000), torch.arange(64)); "
        "slow, fast = mbkern.loss_and_grad(*call), loss_and_grad(*call); "
        "print(mbkern.loss_and_grad.__name__, torch.equal(slow[1], fast[1]))"
    )
    python = ab_check.slow_python(tmp_path, 0.1)
    done = subprocess.run([python, "-c", compare], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["slowed", "True"]


def test_the_spread_of_every_loss_is_measured() -> None:
    """``bench/spread.py``, which takes minutes, on one case of each kind."""
    cases = spread.cases(Plan())
    assert {case.name.split()[0] for case in cases} == set(FORMULAS)
    for name in ("cross_entropy (64, 1000)", "mse_loss (65536,)", "nll_loss (64, 1000)"):
        (case,) = (c for c in cases if c.name == name and c.dtype == "float32")
        problem = case.build(Plan())
        way, control = problem.ways
        assert way.calls >= 1
        assert control.limit
        assert way.check is not None
        assert way.check(way.run()) <= problem.tolerance


def test_a_spread_is_taken_from_the_pass_of_the_quietest_control() -> None:
    busy, quiet = spread.Spread(0.01, 0.02), spread.Spread(0.05, 0.015)
    assert spread.quietest([{"a": busy}, {"a": quiet}]) == {"a": quiet}
    assert quiet.missed
    assert not spread.Spread(0.05, 0.04).missed


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("no_such_suite",), "unknown suite 'no_such_suite'"),
        (("ab", "--a", "x", "--b", "y", "no_such_suite"), "unknown suite 'no_such_suite'"),
        (("overhead", "--suite-file", "/no/file.py"), "there is no file /no/file.py"),
        (("compare", "no.jsonl", "such.jsonl"), "No such file"),
        (("ab", "--a", "/no/python", "--b", sys.executable), "cannot run /no/python"),
        (("ab", "--a", "x", "--b", "y", "--processes", "0"), "--processes: '0' is no number"),
        (("--threads", "0"), "--threads: '0' is no number"),
        (("--threads", "1,two"), "--threads: 'two' is no number"),
        (("--seconds", "-1"), "--seconds: '-1' is no time"),
        (("--repeats", "0"), "--repeats: '0' is no number"),
        (("--allocators", "default,bogus"), "'bogus'; there are default, recycled"),
        (("--directions", "sideways"), "'sideways'; there are both, forward, backward"),
        (("scaling", "--loss", "nonsense"), "unknown loss 'nonsense'; there are cross_entropy"),
        (("minibatch", "--loss", "nonsense"), "unknown loss 'nonsense'; there are cross_entropy"),
        (("overhead", "--output", "/no/folder/x"), "cannot write /no/folder/x: No such file"),
    ],
)
def test_what_is_not_understood_is_said(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(words)
    assert ending.value.code == 2
    said = capsys.readouterr()
    assert text in said.err
    assert not said.out


def test_a_status_is_that_of_the_command() -> None:
    done = _bench("overhead", "--output", "/no/folder/x")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_run_without_cases_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sleeping", "--suite-file", SUITE_FILE, "--allocators", "default")
    assert cli.main([*words, "--directions", "backward"]) == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_costs_no_measurement(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder = run.Recorder(Path("/dev/full"))
    for provider in ("a", "b"):
        row = Row("s", "c", [1], "float32", "both", provider, "cpu", "", 1, samples_s=[1.0])
        recorder.add([row])
    assert len(recorder.rows) == 2
    assert run.status(recorder) == 1
    assert capsys.readouterr().err.count("No space left") == 1


def test_ctrl_c_before_the_first_measurement_is_an_interrupted_run(tmp_path: Path) -> None:
    """While the worker imports torch."""
    output = tmp_path / "rows.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "mbkern", "bench", "sleeping", "--suite-file", SUITE_FILE,
         "--threads", "1", "--output", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not (output.exists() and workers.read_text()):
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert output.read_text() == ""
