"""The planner's search on made-up machines of random memory and time: what it takes and says."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings
from collections.abc import Callable

import pytest
import torch

from mbkern._plan_fit import SHARES, Curve, Probe, candidates
from mbkern._plan_options import Options
from mbkern._plan_result import Plan
from mbkern._plan_search import Search
from mbkern._planner import _result

pytestmark = pytest.mark.cpu
MIB = 1 << 20
Of = Callable[[int], float]


class Machine:
    """Of a memory that ends a pass which does not fit, and of times that vary.

    Args:
        peak: bytes of a pass.
        seconds: of a pass.
        room: bytes there are.
        alone: whether one item is refused.
        own: whether the step runs its own backward.
        noise: by which share times vary.
        longer: how much more memory many passes take than two.
    """

    def __init__(
        self, peak: Of, seconds: Of, room: float, rng: random.Random, *, alone: bool = False,
        own: bool = False, noise: float = 0.0, longer: float = 1.0,
    ) -> None:  # fmt: skip
        self.peak, self.seconds, self.room, self.rng = peak, seconds, room, rng
        self.alone, self.own, self.noise, self.longer = alone, own, noise, longer
        self.device, self.held, self.spent, self.several = (
            torch.device("cpu"),
            100 * MIB,
            0.0,
            False,
        )
        self.tried: list[int] = []

    def open(self, items: int) -> None:
        if items == 1 and self.alone:
            raise ValueError("alone")

    def time(self, items: int) -> float:
        taken = self.seconds(items) * (1 + self.noise * self.rng.random())
        self.spent += taken
        return taken

    def probe(self, items: int) -> Probe:
        assert self.peak(items) <= self.room, f"out of memory at {items}"
        self.tried.append(items)
        taken, peak = self.time(items), self.peak(items)
        third = math.nan if self.own else 1 / 3
        return Probe(items, taken * third, taken, peak * third, peak)

    def again(self, probe: Probe) -> Probe:
        return dataclasses.replace(probe, gradient_s=self.time(probe.items))

    def window(self, probe: Probe, passes: int) -> Probe:
        return dataclasses.replace(probe, gradient_bytes=probe.gradient_bytes * self.longer)

    def size_of(self, items: int) -> int:
        return 8 * items


def search(
    machine: Machine, batch: int, *, most: int = 1 << 62, seconds: float = 20.0,
    room: float = 1e15, objective: str = "throughput",
) -> Plan:  # fmt: skip
    found = Search(machine, batch, min(batch, most), seconds)  # type: ignore[arg-type]
    found.start()
    found.room = int(room)
    found.climb()
    verified = found.settle(SHARES[objective])
    return _result(found, verified, Options(batch, None, objective, seconds, 5.0))


def play(seed: int) -> None:
    """A random machine; everything that a plan says of it must hold."""
    rng = random.Random(seed)
    fixed, item = rng.choice([0, rng.uniform(0, 200)]), rng.choice([0, rng.uniform(0, 20)])
    square, kink = rng.choice([0, 0, rng.uniform(4, 9)]), rng.choice([0, rng.uniform(0, 400)])
    times = rng.choice([1e-9, 1e-3, 1]), rng.choice([1e-6, 1e-4, 1]), rng.choice([0, 0, 1e-2])
    wave, batch = rng.choice([0, 0, 0.3]), rng.choice([1, 2, 3, 9, 12, 50, 512, 1000])
    most = rng.choice([batch, 1 << 62, rng.randint(1, batch)])
    alone = min(batch, most) > 1 and rng.random() < 0.2

    def peak(n: int) -> float:
        return max(fixed + item * n + square * n * n, kink) * MIB

    def seconds(n: int) -> float:
        return (times[0] + times[1] * n + times[2] * n * n) * (1 + wave * math.sin(n))

    room = rng.choice([1e15, rng.uniform(0, 3000) * MIB, peak(1), peak(1) * rng.uniform(1, 50)])
    machine = Machine(
        peak, seconds, max(room, peak(2)), rng, alone=alone, own=rng.random() < 0.2,
        noise=rng.choice([0, 0.1]), longer=rng.choice([1, 1.2]),
    )  # fmt: skip
    budget, objective = rng.choice([0, 1e-3, 1, 1e6]), rng.choice(list(SHARES))
    try:
        plan = search(machine, batch, most=most, seconds=budget, room=room, objective=objective)
    except MemoryError:
        assert peak(2 if alone else 1) > int(room)
        return
    size, notes = plan.micro_batch, " ".join(plan.notes)
    assert size in machine.tried
    assert 1 <= size <= min(batch, most)
    assert size * (plan.passes - 1) + plan.tail == batch
    assert 1 <= plan.tail <= size
    assert plan.peak_bytes <= plan.limit_bytes or "the limit may be exceeded" in notes
    assert not alone or plan.tail > 1 or "has 1, which the step refuses" in notes
    assert (size == batch) == ("it fits whole" in plan.limited_by)
    assert (size == most < batch) == ("no more items" in plan.limited_by)
    assert min(plan.seconds, plan.overhead_s, plan.item_s, plan.item_bytes) >= 0
    assert (plan.function_seconds is None) == machine.own
    values = json.loads(plan.to_json())
    known = {field.name for field in dataclasses.fields(Plan)}
    assert set(values) == known | {"items_a_second", "gradient_cost"}
    assert str(plan).startswith(f"micro-batch  {size}: ")


@pytest.mark.parametrize("first", range(0, 600, 200))
def test_random_machines(first: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(first, first + 200):
            play(seed)


# ---- each by itself ------------------------------------------------------------------------------


def test_pairs_alone_do_not_run_out_of_memory() -> None:
    """100 MiB n^2: two sizes show it, and what is in proportion was thought to be enough."""
    machine = Machine(lambda n: 100 * MIB * n * n, lambda n: 1.0 + n, 1200 * MIB, random.Random(0))
    assert search(machine, 16, room=1200 * MIB).limited_by == "the memory limit"


def test_the_memory_limit_is_named_where_less_than_twice_the_size_is_left() -> None:
    """8 of 12 fit: it was the knee."""
    machine = Machine(lambda n: n * MIB * 8, lambda n: 1.0, 90 * MIB, random.Random(0))
    plan = search(machine, 12, room=90 * MIB)
    assert 6 <= plan.micro_batch < 12
    assert plan.limited_by == "the memory limit"


def test_the_end_of_the_time_is_no_knee() -> None:
    machine = Machine(lambda n: n, lambda n: 1.0 + n / 1000, 1e15, random.Random(0))
    plan = search(machine, 512, seconds=1.0)
    assert plan.micro_batch <= 16
    assert plan.limited_by == "the seconds to measure, which were over"
    assert "no larger because of the seconds to measure" in str(plan)


def test_what_takes_more_in_many_passes_gives_place() -> None:
    """Its peak was above the limit, and it was taken all the same."""

    class Growing(Machine):
        def window(self, probe: Probe, passes: int) -> Probe:
            return dataclasses.replace(probe, gradient_bytes=probe.gradient_bytes + 25 * MIB)

    machine = Growing(lambda n: 10 * n * MIB, lambda n: 1.0, 1e15, random.Random(0))
    plan = search(machine, 8, room=100 * MIB)
    assert 4 <= plan.micro_batch < 7
    assert plan.peak_bytes <= plan.limit_bytes
    machine = Growing(lambda n: 10 * MIB, lambda n: 1.0, 1e15, random.Random(0))
    assert "the limit may be exceeded" in search(machine, 8, room=20 * MIB).notes[-1]


def test_a_tail_that_is_refused_is_told() -> None:
    machine = Machine(lambda n: n, lambda n: 1.0, 1e15, random.Random(0), alone=True)
    plan = search(machine, 3, most=2)
    assert plan.micro_batch == 2
    assert plan.notes[-1] == "the last micro-batch has 1, which the step refuses"


def test_huge_batches_have_few_candidates() -> None:
    """There were as many as the root of the batch, which took for ever."""
    assert candidates(10**15, 64, 1, [33]) == list(range(1, 65))
    curve = Curve([Probe(n, 1.0, 1.0 + n, 1.0, float(n)) for n in (1, 2, 4)])
    assert curve.bound(8) > 8


def of_all(batch: int, most: int, least: int, measured: list[int]) -> list[int]:
    """The definition."""
    root = math.isqrt(batch) + 1
    sizes = {-(-batch // k) for k in range(1, root + 1)} | {*range(1, root + 1), *measured}
    sizes |= {1 << k for k in range(batch.bit_length())}
    good = [n for n in sizes if least <= n <= min(most, batch)]
    return sorted(n for n in good if batch % n == 0 or batch % n >= least)


def test_candidates_by_their_definition() -> None:
    rng = random.Random(0)
    for _ in range(500):
        batch, least = rng.randint(1, 600), rng.randint(1, 3)
        most, measured = rng.choice([0, 1, rng.randint(1, 900)]), [rng.randint(1, 600)]
        asked = batch, most, least, measured
        assert candidates(*asked) == of_all(*asked), asked
