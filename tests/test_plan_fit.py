"""The planner's arithmetic and its search, on made-up measurements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mbkern._plan_fit import Curve, Probe, candidates, choose
from mbkern._plan_search import Search

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
MIB = 1 << 20


def probe(
    n: int, peak: Callable[[int], float], seconds: Callable[[int], float] = lambda n: 1.0 + n
) -> Probe:
    return Probe(n, seconds(n) / 3, seconds(n), peak(n) / 3, peak(n))


PEAKS: dict[str, Callable[[int], float]] = {
    "affine": lambda n: (40 + 3 * n) * MIB,
    "no fixed part": lambda n: 3 * n * MIB,
    "kink": lambda n: max(100.0, 8.0 * n) * MIB,
    "items in pairs": lambda n: (20 + n + n * n / 4) * MIB,
    "chunked": lambda n: (5 + 2 * n + 30 * min(n, 8) / 8) * MIB,
}


@pytest.mark.parametrize("kind", PEAKS)
def test_the_bound_holds(kind: str) -> None:
    """What the next size takes is never above it, so nothing runs out of memory."""
    peak = PEAKS[kind]
    for last in (4, 8, 16, 32, 64):
        sizes = [1 << k for k in range(last.bit_length())]
        curve = Curve([probe(n, peak) for n in sizes])
        for following in range(last + 1, 2 * last + 1):
            assert peak(following) <= curve.bound(following)


def test_expected_between_and_beyond() -> None:
    curve = Curve([probe(n, PEAKS["affine"]) for n in (1, 2, 8)])
    assert curve.peak(5) == pytest.approx(55 * MIB)
    assert curve.peak(20) == pytest.approx(100 * MIB)
    assert curve.seconds(5) == pytest.approx(6)
    assert curve.seconds(20) == pytest.approx(21)
    assert curve.window(20, 8) == pytest.approx(9 + 9 + 5)
    assert curve.time_line() == pytest.approx((1, 1))
    assert curve.memory_line() == pytest.approx((40 * MIB, 3 * MIB))


def test_candidates_have_no_useless_or_refused_tail() -> None:
    sizes = candidates(512, 200, 1, [3])
    assert {86, 103, 128, 64, 3} <= set(sizes)
    assert max(sizes) <= 200
    assert all(9 % n != 1 for n in candidates(9, 9, 2, []))
    assert 1 not in candidates(9, 9, 2, [])
    assert candidates(1, 1, 1, [1]) == [1]


def test_the_knee_is_taken() -> None:
    """t = 1 + n / 10: 64 passes of 8 take 115 s, one of 512 takes 52 s."""
    curve = Curve([probe(1 << k, PEAKS["affine"], lambda n: 1 + n / 10) for k in range(10)])
    sizes = candidates(512, 512, 1, [])
    at = [choose(curve, 512, sizes, share) for share in (0.97, 0.8)]
    assert at[1] < at[0] <= 512
    best = curve.window(512, 512)
    for n, share in zip(at, (0.97, 0.8), strict=True):
        assert curve.window(512, n) <= best / share
        assert curve.window(512, sizes[sizes.index(n) - 1]) > best / share


class FakeMeter:
    """A machine with a memory of its own, that ends with an error when it is full."""

    def __init__(self, peak: Callable[[int], float], room: float) -> None:
        self.peak, self.room = peak, room
        self.device, self.held, self.spent = torch.device("cpu"), 100 * MIB, 0.0
        self.several = False
        self.tried: list[int] = []

    def open(self, items: int) -> None:
        """Nothing to find out."""

    def probe(self, items: int) -> Probe:
        assert self.peak(items) <= self.room, f"out of memory at {items}"
        self.tried.append(items)
        return probe(items, self.peak, lambda n: 1e-3 * (20 + n))

    def again(self, probe: Probe) -> Probe:
        return probe

    def window(self, probe: Probe, passes: int) -> Probe:
        return probe

    def size_of(self, items: int) -> int:
        return items


@pytest.mark.parametrize("kind", PEAKS)
@pytest.mark.parametrize("room", [130, 333, 5000])
def test_never_out_of_memory(kind: str, room: int) -> None:
    meter = FakeMeter(PEAKS[kind], room * MIB)
    search = Search(meter, 300, 300, 20.0)  # type: ignore[arg-type]
    search.start()
    search.room = room * MIB
    search.climb()
    search.settle(0.97)
    peak = PEAKS[kind]
    assert search.taken in meter.tried
    most = max(n for n in range(1, 301) if peak(n) <= room * MIB)
    assert search.taken <= most
    # The bound gives a quarter away for the noise of a measurement, candidates are not all sizes.
    assert search.taken >= 0.5 * most or peak(search.taken) >= 0.6 * room * MIB or most > 150
