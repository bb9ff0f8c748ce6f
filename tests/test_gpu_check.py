"""The program behind `make gpu-check`, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

from gpu import bench, bits, family, goals, heads, results, sanitize, stage, ways  # noqa: E402
from gpu import tests as gpu_tests  # noqa: E402
from gpu.problem import Case, Problem  # noqa: E402

from mbkern.bench import gpu as sensors  # noqa: E402
from mbkern.bench import peers  # noqa: E402
from mbkern.bench.formulas import ELEMENTS, FORMULAS, ROWS  # noqa: E402
from mbkern.bench.results import Entry, Group  # noqa: E402
from mbkern.bench.timing import Effort, Way, interleave  # noqa: E402

MEMCHECK = """\
========= COMPUTE-SANITIZER
a line of the program
========= Invalid __global__ write of size 4 bytes
=========     at void mbk::cuda::team_rows<mbk::cuda::CrossEntropy, float, true>(Launch)+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f0000000400 is out of bounds
=========
========= Invalid __global__ read of size 8 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x10
=========     by thread (1,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at mbk::cuda::f(int)+0x10 in a.cu:3
=========     and Read access at mbk::cuda::f(int)+0x20 in a.cu:4 [32 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n156 calls\n========= ERROR SUMMARY: 0 errors\n"
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n"


@pytest.mark.parametrize(
    ("output", "finished", "errors", "ours", "first"),
    [
        (MEMCHECK, True, 2, 1, "Invalid __global__ write of size 4 bytes"),
        (RACECHECK, True, 1, 1, "Error: Race reported between Write access"),
        (CLEAN, True, 0, 0, ""),
        (REFUSED, False, 0, 0, ""),
        ("Segmentation fault", False, 0, 0, ""),
    ],
)
def test_findings_of_the_sanitizer_are_read(
    output: str, finished: bool, errors: int, ours: int, first: str
) -> None:
    found = sanitize.parse(output)
    assert (found.finished, found.errors, found.ours) == (finished, errors, ours)
    assert found.first.startswith(first)
    assert bool(found.first) == bool(first)


def test_counts_of_pytest_are_read() -> None:
    last = "3 failed, 200 passed, 4 skipped in 61.20s (0:01:01)\n"
    output = f"12 passed in 0.10s of warm-up\nFAILED tests/a.py::b\n{last}"
    assert gpu_tests.counts(output) == {"failed": 3, "passed": 200, "skipped": 4}
    assert gpu_tests.counts("Fatal Python error: Aborted") == {}


def test_answers_of_nvidia_smi_are_read() -> None:
    line = "580.159.04, 700.00, 123.45, 41, 1980, 2619, 1980, 2619, Enabled, 0x0000000000000004"
    found = sensors.parse_query(line)
    assert found["driver"] == "580.159.04"
    assert found["clock memory max MHz"] == "2619"
    assert sensors.throttling(found) == ["power cap"]
    with pytest.raises(ValueError, match="zip"):
        sensors.parse_query("580.159.04, 700.00")


def test_a_results_file_collects_stages(tmp_path: Path) -> None:
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05+00:00"}
    first = stage.Report(stage.PASSED, "", {"seconds": 1})
    path = results.add("build", first, facts, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3-2026-01-02.json"
    assert results.add("bits", stage.Report(stage.FAILED, "exp"), facts, tmp_path) == path
    results.add("build", stage.Report(stage.PASSED, "", {"seconds": 2}), facts, tmp_path)
    document = json.loads(path.read_text())
    assert list(document["stages"]) == ["build", "bits"]
    assert document["stages"]["build"]["seconds"] == 2
    assert document["stages"]["bits"]["verdict"] == "failed"
    with pytest.raises(ValueError, match="at most"):
        results.add("bench", stage.Report("passed", "x" * results.LARGEST), facts, tmp_path)
    assert json.loads(path.read_text()) == document


def test_programs_are_stopped_when_time_is_up() -> None:
    done = stage.run(
        stage.python("-c", "import time; print('begun', flush=True); time.sleep(60)"), 2
    )
    assert done.status is None
    assert done.seconds < 30
    assert "stopped after" in done.failure()
    done = stage.run(stage.python("-c", "import sys; print('why'); sys.exit(3)"), 60)
    assert done.failure() == "status 3: why"


# ---- Bits ---------------------------------------------------------------------------------------


def test_every_function_has_a_documented_digest() -> None:
    from mbkern import _C

    assert set(bits.documented()) == set(_C.elementary_functions())


def test_inputs_are_all_bit_patterns_in_order() -> None:
    for first in (0, (1 << 31) - bits.CHUNK, (1 << 32) - 3 * bits.CHUNK + 7):
        x = bits.inputs(first, bits.CHUNK, 3, "cpu").T.flatten().view(torch.int32)
        expected = [(first + i) % 2**32 for i in range(3 * bits.CHUNK)]
        assert [word & 0xFFFFFFFF for word in x.tolist()] == expected


@pytest.mark.parametrize("count", [5, bits.CHUNK, 7 * bits.CHUNK + 1])
def test_pieces_cover_every_input_once(count: int) -> None:
    covered = []
    for first, steps, chunks in bits.pieces(11, count, 3):
        covered += range(first, first + steps * chunks)
    assert covered == list(range(11, 11 + count))


def test_the_digest_sees_one_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        bits.on_cpu(name, x, y)
        if (at := (x.view(torch.int32) == bits.CHUNK + 3).nonzero()).numel():
            y.view(torch.int32)[tuple(at[0])] ^= 1

    right = [bits.digest("exp", bits.on_cpu, "cpu", 2 * bits.CHUNK, c) for c in (1, 2)]
    assert right[0] == right[1]  # however the chunks are put side by side
    assert bits.digest("exp", faulty, "cpu", 2 * bits.CHUNK) != right[0]
    monkeypatch.setattr(bits, "documented", lambda: {"exp_nonpositive": 0})
    assert bits.rehearse(stage.Clock()).verdict == stage.PASSED
    monkeypatch.setattr(bits, "hash_columns", lambda words: words[0].long())
    assert bits.rehearse(stage.Clock()).verdict == stage.FAILED


# ---- Benchmarks ---------------------------------------------------------------------------------


def test_the_plan_has_all_cases_of_the_goals() -> None:
    plan = bench.plan(bench.ELEMENTS)
    for dtype in (torch.float32, torch.bfloat16):
        rows = [case for case, *_ in plan if case.loss == "cross_entropy" and case.dtype is dtype]
        assert {case.columns for case in rows} >= {1000, 32000, 128256, 262144}
        assert all(case.rows * case.columns >= 1 << 28 for case in rows)
        moved = {(c.loss, m is ways.BUFFER): size for c, m, size in plan if c.dtype is dtype}
        size = dtype.itemsize
        assert moved == {
            ("cross_entropy", False): 2 * size,  # logits in, gradient out
            ("cross_entropy", True): size + 8,  # and the buffer in and out
            ("half_squared_error", False): 3 * size,
            ("half_squared_error", True): 2 * size + 8,
        }


@pytest.mark.parametrize("loss", ["cross_entropy", "half_squared_error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [0.5, float("nan"), float("inf")])
def test_wrong_results_are_not_ranked(loss: str, dtype: torch.dtype, fault: float) -> None:
    def wrong(p: Problem) -> ways.Run:
        right = ways.in_place(p)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            value, grad = right()
            grad.view(-1)[5] = fault
            return value, grad

        return run

    case = Case(loss, 3, 70, dtype)
    effort = Effort(0.0, 0.0, least=2)
    makers = {"faulty": wrong, ways.IN_PLACE: ways.in_place, ways.EAGER: ways.eager}
    group = bench.measure(case, makers, 2 * dtype.itemsize, effort, "cpu")
    correct = {e.name: e.correct for e in group.entries}
    assert correct == {ways.COPY: True, "faulty": False, ways.IN_PLACE: True, ways.EAGER: True}
    assert all(len(e.samples) == 2 for e in group.entries)


def test_results_of_everything_are_small_enough_to_commit() -> None:
    names = ["copy", "torch", "mbkern in place", "mbkern autograd", "Liger", "quack", "apex"]
    entries = [Entry(name, [0.123456] * 9, 1.2e-7, note="quack is not installed") for name in names]
    groups = len(bench.plan(bench.ELEMENTS)) + len(family.plan(bench.ELEMENTS)) + 3
    group = Group("gpu", "cross_entropy fp32 (268436, 1000)", 1, "cuda", "ms", "copy", entries)
    text = json.dumps([bench.compact(group)] * groups, indent=1)
    goal = dict.fromkeys(("what", "reach", "case", "verdict"), "share of copy bandwidth, losses")
    assert len(text) + 2 * groups * len(json.dumps(goal, indent=1)) < 0.9 * results.LARGEST
    assert bench.compact(group)["entries"][0]["median"] == 0.1235
    assert "samples" not in text


def test_a_sum_in_a_buffer_is_checked_too() -> None:
    case = Case("cross_entropy", 3, 70, torch.bfloat16)
    group = bench.measure(case, ways.BUFFER, 10, Effort(0.0, 0.0, least=1), "cpu")
    assert [e.correct for e in group.entries] == [True, True]
    assert group.case.endswith(bench.ACCUMULATED)


def test_heads_are_checked_too() -> None:
    times, memory = heads.measure(16, 90, 24, Effort(0.0, 0.0, least=1), "cpu")
    right = {e.name for e in times.entries if e.samples and e.correct}
    assert right >= {ways.EAGER, heads.FORWARD, heads.BUFFER, heads.IMPERATIVE, heads.LOGITS,
                     heads.THREE, heads.FOUR}  # fmt: skip
    assert {e.name for e in memory.entries} >= {heads.BUFFER, heads.IMPERATIVE, heads.LIMIT_MIB}
    head = heads.Head(16, 90, 24, "cpu")
    value, grad = heads.WAYS[ways.EAGER](head)()
    assert head.error(value, grad) <= head.tolerance
    assert not head.error(value, 1.3 * grad) <= head.tolerance
    assert not head.error(value * float("nan"), grad) <= head.tolerance


def test_losses_of_the_family_are_checked_too() -> None:
    plan = family.plan(1 << 12)
    assert {formula.name for formula, *_ in plan} == {f.name for f in (*ELEMENTS, *ROWS)}
    for name, shape in (("mse_loss", (5,)), ("nll_loss", (3, 7))):
        formula = FORMULAS[name]
        group = family.measure(
            formula, shape, torch.float32, Effort(0.0, 0.0, least=1), "cpu", repeated=4
        )
        assert [e.correct and len(e.samples) for e in group.entries] == [1, 1, 1]
        p = family.Repeated(formula, shape, torch.float32, "cpu", 4)
        value, grad = p.in_place()
        assert p.error(value, grad) < 1e-6
        grad.view(-1)[-1] += 0.5  # of the last repetition alone
        assert p.error(value, grad) == float("inf")


def test_absent_peers_are_listed_with_the_reason() -> None:
    makers = {"peer": lambda p: peers.load("no_such_library", "f")}
    case = Case("cross_entropy", 3, 70, torch.float32)
    group = bench.measure(case, makers, 8, Effort(0.0, 0.0, least=1), "cpu")
    assert "no_such_library" in group.entries[1].note
    assert not goals._where("", "peer")(group)
    assert goals._where("", ways.COPY)(group)


def test_ways_are_timed_in_turn() -> None:
    order = []
    timed = [
        Way(name, lambda name=name: order.append(name), lambda: order.append("prepare"))
        for name in "ab"
    ]
    entries = interleave(timed, Effort(0.0, 0.0, least=2), "cpu")
    assert [len(e.samples) for e in entries] == [2, 2]
    assert order == ["prepare", "a", "prepare", "b"] * 3  # one round warms up


# ---- The program --------------------------------------------------------------------------------


def _gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu_check.py"), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_said_to_be_checked(tmp_path: Path) -> None:
    done = _gpu_check("--stage", "bits", "--stage", "bench", "--results", str(tmp_path))
    *_, bits_line, bench_line, last = done.stdout.splitlines()
    assert bits_line.startswith("bits       not run: no GPU")
    assert bench_line.startswith("bench      not run: no GPU")
    assert last == "nothing was checked"
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_stage_that_breaks_fails(tmp_path: Path) -> None:
    broken = tmp_path / "gpu_check.py"
    source = (BENCH / "gpu_check.py").read_text()
    broken.write_text(source.replace("return bits.rehearse(clock)", "import os; os.abort()"))
    done = subprocess.run(
        [sys.executable, str(broken), "--rehearse", "--stage", "bits"],
        env={"PYTHONPATH": str(BENCH), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "the stage ended without a report: status -6" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 1 stages FAILED"
    assert done.returncode == 1
