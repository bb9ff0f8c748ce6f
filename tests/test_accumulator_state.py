"""A state of an accumulator with a part that ``state_dict`` never gives changes nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mbkern import GradAccumulator

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

OPTIONS: list[dict[str, Any]] = [
    {}, {"noise_scale": True}, {"mode": "streaming", "measure": True}, {"mode": "known"},
    {"denominators": ("a", "b")}, {"dtype": torch.bfloat16, "compensation": "kahan"},
    {"dtype": torch.bfloat16, "compensation": "stochastic"}, {"max_norm": 0.1, "l2": 0.1},
]  # fmt: skip
WRONG: list[Any] = [
    None, "x", -1, 1.5, [], {}, (), torch.zeros(2), float("nan"), torch.ones((), device="meta"),
    True, 10**30, torch.ones((), dtype=torch.complex64),
]  # fmt: skip


def accumulator(rng: random.Random, options: dict[str, Any]) -> tuple[nn.Module, GradAccumulator]:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    acc = GradAccumulator(net, **options)
    go_on(net, acc, rng, rng.randint(0, 3))
    return net, acc


def go_on(net: nn.Module, acc: GradAccumulator, rng: random.Random, steps: int) -> None:
    if acc.mode == "known" and acc._window.totals is None and not acc._window.micro_batches:
        acc.begin(10)
    for _ in range(steps):
        count = rng.choice([2, 2.0, torch.tensor(2)])
        acc.backward(net(torch.ones(2, 3)).sum(), count, rng.choice(acc._names))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list | tuple):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed: Any = list(value) if isinstance(value, tuple) else copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def play(seed: int) -> None:
    rng = random.Random(seed)
    options = rng.choice(OPTIONS)
    _, saved = accumulator(rng, options)
    state = saved.state_dict()
    place, new = rng.choice([*places(state)]), rng.choice(WRONG)
    net, acc = accumulator(rng, options)
    before = acc.state_dict()
    refused = ""
    try:
        acc.load_state_dict(replaced(state, place, new))
    except (ValueError, TypeError) as error:
        refused = str(error)
    if refused:
        assert refused.startswith("mbkern: "), (seed, place, new)
        assert same(before, acc.state_dict()), (seed, place, new)
    elif acc.mode != "known":  # it was as good as what was there
        go_on(net, acc, rng, 1)
        assert acc.flush().micro_batches > 0


@pytest.mark.parametrize("first", range(0, 400, 200))
def test_one_part_that_is_wrong(first: int) -> None:
    for seed in range(first, first + 200):
        play(seed)
