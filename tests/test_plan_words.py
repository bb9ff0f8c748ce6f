"""What a plan says, in words and in its picture."""

from __future__ import annotations

import dataclasses
import random

import pytest
from test_plan_search import Machine, search

from mbkern import _plan_picture, _units
from mbkern._plan_result import Instead, Plan


def _plan(**facts: object) -> Plan:
    found = Plan(
        64, 12345, 193, 57, "throughput", "the memory limit", 0.9997, 0.4, 1 << 28, 1020 << 20,
        1 << 41, 9.998e-4, 1e-6, 1 << 20, 1e3, "cpu", None, None, [], [],
    )  # fmt: skip
    return dataclasses.replace(found, **facts)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.0, "1234 s"), (2.41e5, "241000 s"), (0.9996, "1 s"), (0.9994, "999 ms"),
        (9.996e-4, "1 ms"), (0.0123, "12.3 ms"), (9.996e-7, "1 us"), (5e-9, "5 ns"), (0.0, "0 ns"),
    ],
)  # fmt: skip
def test_times(value: float, text: str) -> None:
    """999.6 us was shown as 0 s, or as 1e+03 us."""
    assert _units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"), (1023, "1023 bytes"), (1500, "1.46 KiB"), (1020 << 20, "1020 MiB"),
        ((1 << 30) - 1, "1 GiB"), (1 << 41, "2 TiB"), (1 << 51, "2048 TiB"),
    ],
)  # fmt: skip
def test_sizes(value: float, text: str) -> None:
    """1020 MiB were 1.02e+03 MiB."""
    assert _units.size(value) == text


def test_a_plan_has_no_powers_of_ten() -> None:
    noted = Instead.of(12345, 2000.0, 1999.0, 300000.0)
    text = str(_plan(seconds=2000.0, batch_size=24690001, instead=noted))
    assert "e+" not in text
    assert "2000 s a batch, 12345 items/s" in text
    assert "two steps of 12345001 and 12345000:" in text
    assert "a noise scale of 300000 items" in text
    assert "two steps of 50:" in str(_plan(batch_size=100, instead=Instead(1.0)))
    first = str(_plan()).splitlines()
    assert first[1].startswith(
        "expected     1 s a batch, 12349 items/s; at the peak 1020 MiB of 2 T"
    )
    assert first[2].startswith("model        a pass takes 1 ms and 1 us an item")


def test_few_sizes_in_the_time_are_no_sure_knee() -> None:
    """A second pass that was slow by chance looked like the end of all gain."""
    machine = Machine(lambda n: n, lambda n: 1.0 if n == 1 else 9.0 * n, 1e15, random.Random(0))
    plan = search(machine, 512, seconds=1.0)
    assert plan.micro_batch == 1
    assert plan.notes == [
        "the seconds to measure were over after 2 of 512 items, too few to be sure of the knee: "
        "give more"
    ]


def test_numbers_below_the_picture_lie_apart() -> None:
    """59 was written over 64."""
    sizes = [1, 2, 4, 8, 16, 32, 59, 64, 128, 256, 512]
    assert _plan_picture._apart(sizes, 64) == [n for n in sizes if n != 59]
    assert _plan_picture._apart(sizes, 59) == [n for n in sizes if n != 64]
    assert _plan_picture._apart([7], 7) == [7]
    assert (
        _plan_picture._title(_plan()) == "a batch of 12345 in 193 passes of 64, the last one of 57"
    )
    whole = _plan(batch_size=64, passes=1, tail=64)
    assert _plan_picture._title(whole) == "a batch of 64 in 1 pass of 64"
