"""What the benchmark reads off samples, on samples whose truth is known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mbkern.bench import statistics
from mbkern.bench.compare import (
    FASTER,
    NOT_COMPARED,
    SAME,
    SLOWER,
    UNDECIDED,
    Rule,
    compare,
    differences,
    doubts,
    failing,
    judge,
)
from mbkern.bench.rows import Row, append, latest, load
from mbkern.bench.statistics import Ratio

RUNS = range(20)


def _times(random: np.random.Generator, n: int, scale: float) -> list[float]:
    """As a busy machine gives them: 5 % of noise, to the right, and every tenth an outlier."""
    noise = random.lognormal(0.0, 0.05, n) * np.where(random.random(n) < 0.1, 2.0, 1.0)
    return list(1e-3 * scale * noise)


def _row(samples: list[float], pair: str = "") -> Row:
    row = Row("s", "c", [1], "float32", "both", "mbkern", "cpu", "avx2", 1, pair=pair)
    row.samples_s = samples
    return row


def test_intervals_of_medians_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = statistics.median_interval(random.lognormal(0.0, 0.3, 25))
        held += low <= 1.0 <= high
    assert 180 <= held <= 199


def test_few_samples_have_the_whole_range_as_interval() -> None:
    assert statistics.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="no samples"):
        statistics.summarise([])


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 13, 15, 25, 200])
def test_intervals_of_few_samples_hold_the_truth_too(n: int) -> None:
    """Percentiles of resampled medians held it in 87 % of seven samples."""
    random = np.random.default_rng(n)
    ends = [statistics.median_interval(random.lognormal(0.0, 0.3, n)) for _ in range(2000)]
    assert sum(low <= 1.0 <= high for low, high in ends) >= 0.94 * len(ends)


def test_intervals_of_many_samples_are_as_wide_as_they_must() -> None:
    """Where the binomial distribution is taken to be normal, they are not narrower than before."""
    before, after = (statistics._beyond(n) for n in (1000, 1001))
    assert before - 2 <= after <= before + 1
    assert statistics._beyond(1000) == 468  # P(X <= 468) = 0.0231 and P(X <= 469) = 0.0268


def test_intervals_of_two_processes_count_their_difference_in() -> None:
    """In 11 of 100 cases they held the truth."""
    random = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        a, b = ([] for _ in range(2))
        for side in (a, a, b, b):
            side += list(random.lognormal(0.0, 0.02) * random.lognormal(0.0, 0.01, 40))
        ratio = statistics.in_turns(a, b, [40, 40])
        assert ratio is not None
        held += ratio.low <= 1.0 <= ratio.high
    assert held >= 180


def test_slopes_of_few_sizes_have_wide_intervals() -> None:
    """Of three sizes they held the true slope in 73 % of all cases, called 95 %."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        samples = [
            size * random.lognormal(0.0, 0.1) * random.lognormal(0.0, 0.02, 9)
            for size in (16.0, 64.0, 256.0)
        ]
        found = statistics.growth([16, 64, 256], samples)
        assert found is not None
        held += found.low <= 1.0 <= found.high
    assert held >= 180


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("pair", ["", "p"])
def test_few_samples_decide_nothing(n: int, pair: str) -> None:
    """One sample of each was an interval without width, and SLOWER, FASTER or SAME."""
    old, new = (_row([scale * 1e-3] * n, pair) for scale in (1.0, 1.2))
    (found,) = compare([old], [new], 0.05)
    enough = not pair and n >= 4
    assert found.verdict == (SLOWER if enough else UNDECIDED)
    assert found.reason == ("" if enough else "too few samples")


def test_outliers_are_counted() -> None:
    found = statistics.summarise([1.0, 1.1, 0.9, 1.0, 1.05, 9.0])
    assert (found.outliers, found.n, found.minimum) == (1, 6, 0.9)


@pytest.mark.parametrize("seed", RUNS)
@pytest.mark.parametrize("pair", ["", "p"])
def test_a_planted_slowdown_is_caught_and_a_twin_is_not_flagged(seed: int, pair: str) -> None:
    random = np.random.default_rng(seed)
    drift = 1 + 0.1 * np.sin(np.arange(150) / 20)  # slow, and the same for both that take turns
    a, b, twin = (np.array(_times(random, 150, s)) * drift for s in (1.0, 1.1, 1.0))
    old = _row(list(a), pair)
    (slow,) = compare([old], [_row(list(b), pair)], 0.05)
    (same,) = compare([old], [_row(list(twin), pair)], 0.05)
    assert slow.ratio is not None
    assert slow.ratio.low < 1.1 * 1.01 < slow.ratio.high * 1.05
    assert slow.verdict == SLOWER
    assert same.verdict in (SAME, UNDECIDED)
    assert failing([slow, same], Rule(SLOWER, 0.05)) == [slow]


@pytest.mark.parametrize("seed", RUNS)
def test_twins_whose_processes_differ_are_not_flagged(seed: int) -> None:
    """Each process is off by some percent, and whoever is second in a round is faster by 10 %."""
    random = np.random.default_rng(100 + seed)
    second = np.where(np.arange(600) % 2, 0.9, 1.0)

    def samples(scale: float, order: np.ndarray, off: float) -> list[float]:
        found: list[float] = []
        for _ in range(5):
            luck = random.lognormal(0.0, off)
            found += list(np.array(_times(random, 600, scale * luck)) * order)
        return found

    def row(*arguments: object) -> Row:
        made = _row(samples(*arguments), "p")  # type: ignore[arg-type]
        made.blocks = [600] * 5
        return made

    first = 0.9 / second
    (twin,) = compare([row(1.0, second, 0.04)], [row(1.0, first, 0.04)], 0.05)
    assert twin.verdict in (SAME, UNDECIDED)
    assert twin.ratio is not None
    assert twin.ratio.low <= twin.ratio.median <= twin.ratio.high
    (slow,) = compare([row(1.0, second, 0.01)], [row(1.1, first, 0.01)], 0.05)
    assert slow.verdict == SLOWER


def test_verdicts_go_by_the_interval() -> None:
    def of(low: float, high: float) -> str:
        return judge(Ratio((low + high) / 2, low, high, 9, 1.0), 0.05)

    assert of(1.06, 1.2) == SLOWER
    assert of(0.8, 0.94) == FASTER
    assert of(0.96, 1.04) == SAME
    assert of(1.04, 1.2) == of(0.94, 1.04) == UNDECIDED


def test_rules_are_read() -> None:
    assert Rule.parse("slower:2.5%") == Rule(SLOWER, 0.025)
    with pytest.raises(ValueError, match="slower:5%"):
        Rule.parse("worse:5%")


def test_a_row_that_is_no_longer_right_fails_a_comparison() -> None:
    wrong = _row([1e-3] * 9)
    wrong.status = "wrong"
    found = compare([_row([1e-3] * 9)], [wrong], 0.05)
    assert failing(found, Rule()) == found


def _failed(**facts: object) -> Row:
    """Of a whole case, or a whole suite."""
    row = _row([])
    row.provider, row.status, row.reason = "(all)", "failed", "MemoryError: too large"
    for name, value in facts.items():
        setattr(row, name, value)
    return row


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ([], "only in A"),
        ([_failed()], "measured in A, failed in B (MemoryError: too large)"),
        ([_row([1e-3] * 9), _failed()], "measured in A, failed in B (MemoryError: too large)"),
        (
            [_failed(suite="r, s", case="(all)", dtype="", status="skipped", reason="no s")],
            "measured in A, skipped in B (no s)",
        ),
        ([_failed(threads=2)], "only in A"),
        ([_row([])], "measured in A, without samples in B"),
    ],
)
def test_what_is_lost_is_named_and_fails_a_comparison(new: list[Row], reason: str) -> None:
    old = _row([1e-3] * 9)
    (lost,) = compare([old], new, 0.05)
    assert (lost.verdict, lost.reason) == (NOT_COMPARED, reason)
    assert failing([lost], Rule(FASTER)) == [lost]
    (gained,) = compare(new, [old], 0.05)
    assert gained.verdict == NOT_COMPARED
    assert not failing([gained], Rule())


def test_what_is_right_again_is_no_longer_failed() -> None:
    good = _row([1e-3] * 9)
    assert list(latest([_failed(), good]).values()) == [good]


def test_what_was_not_measured_again_stays_as_it_was() -> None:
    """``torch.compile`` of one run was lost by a second without ``--compile``."""
    measured, skipped = _row([1e-3] * 9), _row([])
    skipped.status, skipped.reason = "skipped", "see --compile"
    assert list(latest([measured, skipped]).values()) == [measured]
    assert list(latest([skipped, measured]).values()) == [measured]


def test_machines_are_those_of_the_rows_that_are_compared() -> None:
    """They were those of the first row of each file, which a later run had replaced."""
    first, last, other, new = (_row([1e-3] * 9) for _ in range(4))
    other.case = "d"
    for row, version in ((first, "2.1"), (last, "2.2"), (other, "2.2"), (new, "2.2")):
        row.environment = {"torch": version, "isa": "avx2"}
    assert not differences([first, last], [new])
    assert differences([last, first], [new]) == ["torch: 2.1 in A, 2.2 in B"]
    assert differences([first, other], [new]) == ["torch: 2.1 and 2.2 in A, 2.2 in B"]
    new.environment["isa"] = "avx512"
    assert differences([last], [new]) == ["isa: avx2 in A, avx512 in B"]


def test_what_an_interval_leaves_out_is_said() -> None:
    rows = [_row([1e-3] * 9, pair) for pair in ("", "", "p", "p", "p", "p")]
    for row, blocks in zip(rows[2:], ([9], [9], [5, 4], [5, 4]), strict=True):
        row.blocks = blocks
    found = [compare([a], [b], 0.05)[0] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    apart, single = doubts(found)
    assert apart.startswith("1 of 3 did not take turns")
    assert single.startswith("1 of 3 took turns in one pair of processes")
    assert not doubts(found[2:])


def test_rows_go_through_a_pipe(tmp_path: Path) -> None:
    """``--output /dev/stdout`` ended in "cannot write /dev/stdout: None"."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        append(pipe, [_row([1.0])])
        append(pipe, [_row([2.0])])
        assert os.read(reader, 1 << 16).count(b"\n") == 2
    finally:
        os.close(reader)


def test_limits_are_not_compared() -> None:
    limit = _row([1e-3] * 9)
    limit.limit = True
    assert not compare([limit], [], 0.05)
    assert not compare([], [limit], 0.05)


def test_growth_finds_the_exponent() -> None:
    random = np.random.default_rng(3)
    sizes = [2.0**k for k in range(6, 14)]
    found = statistics.growth(sizes, [_times(random, 30, s) for s in sizes])
    assert found is not None
    assert found.low <= 1.0 <= found.high
    assert found.high - found.low < 0.1
    square = statistics.growth(sizes, [_times(random, 30, s * s) for s in sizes])
    assert square is not None
    assert abs(square.slope - 2) < 0.05
    assert statistics.growth(sizes[:2], [[1.0], [2.0]]) is None


def test_the_knee_is_where_larger_is_no_longer_faster() -> None:
    assert statistics.knee([1, 2, 4, 8, 16], [8.0, 4.0, 2.1, 2.0, 2.05]) == 4


def test_files_grow_and_a_cut_line_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, [_row([1.0]), _row([2.0])])
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    append(path, [_row([3.0])])
    rows, warnings = load(path)
    assert [r.samples_s for r in rows] == [[1.0], [3.0]]
    assert len(warnings) == 1
    assert "line 2" in warnings[0]


def test_rows_survive_a_file_and_unknown_fields(tmp_path: Path) -> None:
    row = _row([1.0, 2.0])
    row.error_vs_fp64, row.extra = float("nan"), {"samples": 3}
    path = tmp_path / "rows.jsonl"
    path.write_text(row.to_json()[:-1] + ', "of_the_future": 1}\n')
    (found,), warnings = load(path)
    assert not warnings
    assert found.error_vs_fp64 != found.error_vs_fp64
    found.error_vs_fp64 = row.error_vs_fp64 = 0.0
    assert found == row
