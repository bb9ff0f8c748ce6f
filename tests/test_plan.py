"""Plans of small steps that are really measured, what is refused, and the plan of several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plan_rank
import process_group
import pytest
import torch
from torch import Tensor

import mbkern
from mbkern._plan_measure import Ranks, leaves

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(256, 256), torch.nn.Dropout(0.5), torch.nn.Linear(256, 3)
    )


def test_a_plan() -> None:
    net = model()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    weights = [p.detach().clone() for p in net.parameters()]
    state = torch.get_rng_state()

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        fresh = torch.ones(9 << 20)  # above what the heap may have free: a pass takes memory
        return net(batch["x"]).square().sum() * fresh[0]

    found = mbkern.plan(step, {"x": torch.ones(64, 256)}, 50, noise_scale=100.0, seconds=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
    assert found.passes == len(found_parts := mbkern.micro_batches(torch.ones(50), found))
    assert found_parts.sizes[-1] == found.tail
    assert found.peak_bytes <= found.limit_bytes
    assert found.held_bytes < found.peak_bytes
    assert found.gradient_cost > 1
    assert found.instead.progress == pytest.approx(2 * (1 + 2) / (1 + 4))
    data = json.loads(found.to_json())
    assert data["micro_batch"] == found.micro_batch
    assert data["gradient_cost"] == found.gradient_cost
    assert [line.split()[0] for line in str(found).splitlines()][:6] == [
        "micro-batch", "expected", "model", "gradient", "verified", "instead",
    ]  # fmt: skip


def test_uneven_items_are_noted_and_the_largest_of_three_counts() -> None:
    lengths = iter([5, 400, 7] * 200)

    def sample(n: int) -> Tensor:
        return torch.ones(n, next(lengths) if n > 1 else 10)

    weight = torch.ones((), requires_grad=True)
    found = mbkern.plan(lambda x: (weight * x).sum(), sample, 4, seconds=0.1)
    assert "the sample's items differ in size (40 bytes each of 1, 1600 of 2)" in found.notes[0]


def test_a_step_with_a_backward_of_its_own() -> None:
    net = model()
    acc = mbkern.GradAccumulator(net)

    def step(x: Tensor) -> Tensor:
        loss = net(x).sum()
        acc.backward(loss, count=len(x))
        return loss.detach()

    found = mbkern.plan(step, torch.ones(8, 256), 8, seconds=0.1)
    acc.reset()
    assert found.function_seconds is None
    assert found.gradient_cost is None
    assert json.loads(found.to_json())["probes"][0]["function_s"] is None


def test_one_item_refused_by_the_step() -> None:
    """Batch normalisation: the tail must not be one item either."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    found = mbkern.plan(lambda x: net(x).sum(), torch.randn(9, 4), 9, seconds=0.1)
    assert "one item alone is refused" in found.notes[0]
    assert found.tail != 1


def test_a_batch_of_one() -> None:
    net = model()
    found = mbkern.plan(lambda x: net(x).sum(), torch.ones(1, 256), 1, seconds=0.1)
    assert (found.micro_batch, found.passes, found.tail) == (1, 1, 1)
    assert found.verified is None
    assert found.instead is None


def test_refusals() -> None:
    net = model()
    x = torch.ones(4, 256)

    def broken(batch: Tensor) -> Tensor:
        if len(batch) > 2:
            raise KeyError("three")
        return net(batch).sum()

    state = torch.get_rng_state()
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (lambda b: net(b), x, {}, ValueError, r"0-dim tensor, not \(1, 3\)"),
        (lambda b: 1.0, x, {}, ValueError, "not float"),
        (broken, x, {}, KeyError, "three"),
        (lambda b: net(b).sum(), x, {"objective": "speed"}, ValueError, "'speed'"),
        (lambda b: net(b).sum(), x, {"batch_size": 0}, ValueError, "batch_size is 0"),
        (lambda b: net(b).sum(), x, {"noise_scale": -1.0}, ValueError, "noise_scale is -1"),
        (lambda b: net(b).sum(), ["text"], {}, ValueError, "nothing to cut"),
    ]
    for step, sample, options, error, message in cases:
        with pytest.raises(error, match=message):
            mbkern.plan(step, sample, **{"batch_size": 4, "seconds": 0.1, **options})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise_scale": -1.0}, ValueError, "noise_scale is -1"),
        ({"noise_scale": float("inf")}, ValueError, "noise_scale is inf"),
        ({"noise_scale": "large"}, ValueError, "large"),
        ({"seconds": float("nan")}, ValueError, "seconds is nan"),
        ({"seconds": None}, TypeError, "NoneType"),
        ({"memory_limit": -1}, ValueError, "memory_limit is -1"),
        ({"memory_limit": "1G"}, TypeError, "str"),
        ({"batch_size": 4.5}, TypeError, "float"),
        ({"objective": "speed"}, ValueError, "'speed'"),
    ],
)
def test_refused_before_measuring(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def step(batch: Tensor) -> Tensor:
        raise AssertionError("measured")

    with pytest.raises(error, match=message):
        mbkern.plan(step, torch.ones(4, 256), **{"batch_size": 4, **options})


def test_a_rank_that_refuses_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells the others first: they would wait for it in their first collective."""
    told: list[list[float]] = []

    def most(ranks: Ranks, values: list[float]) -> list[float]:
        told.append(values)
        return [1.0]

    monkeypatch.setattr(Ranks, "most", most)
    for batch_size, message in ((0, "batch_size is 0"), (4, "another rank")):
        with pytest.raises(ValueError, match=message):
            mbkern.plan(lambda x: x.sum(), torch.ones(4), batch_size)
    assert told == [[1.0], [0.0]]


def estimate(value: float) -> mbkern.NoiseScale:
    found = mbkern.NoiseScale()
    found.load_state_dict({"sums": torch.tensor([1.0, value, 1.0]).double()})
    return found


@pytest.mark.parametrize(
    "noise_scale",
    [mbkern.NoiseScale(), estimate(-3.0), torch.tensor(float("nan")), float("nan")],
    ids=["fresh", "negative", "tensor", "number"],
)
def test_a_noise_scale_that_is_not_known_yet(noise_scale: Any) -> None:
    """The first windows of a training may have none: the plan is not lost for that."""
    net = model()
    found = mbkern.plan(
        lambda x: net(x).sum(), torch.ones(2, 256), 2, noise_scale=noise_scale, seconds=0.1
    )
    assert found.instead.noise_scale is None
    assert "note         the noise scale is not known yet" in str(found)
    assert "not known yet" in json.loads(found.to_json())["notes"][-1]


def test_a_noise_scale_that_is_known() -> None:
    net = model()
    found = mbkern.plan(
        lambda x: net(x).sum(), torch.ones(2, 256), 2, noise_scale=estimate(3.0), seconds=0.1
    )
    assert found.instead.noise_scale == 3
    assert "at a noise scale of 3 items" in str(found)
    assert not any("noise" in note for note in found.notes)


def test_leaves_are_found_once() -> None:
    a = torch.ones(2, requires_grad=True)
    b = torch.ones(2, requires_grad=True)
    found = leaves((a * b + a.exp()).sum())
    assert {id(t) for t in found} == {id(a), id(b)}
    assert len(found) == 2
    assert leaves(torch.ones(())) == []


def test_ranks_agree(tmp_path: Path) -> None:
    process_group.run(plan_rank.__file__, 2, tmp_path)
    first, second = ((tmp_path / f"out.{k}").read_text() for k in range(2))
    assert first == second
    plan = json.loads(first)
    assert plan["limit_bytes"] == 2 << 30
    assert plan["instead"]["noise_scale"] == 4
    here, there = (json.loads((tmp_path / f"said.{k}").read_text()) for k in range(2))
    assert here[:2] == there[:2]
    assert "one item alone is refused" in here[1]
    assert here[2:] == [
        "ElsewhereError: mbkern: step or sample raised on another rank",
        "ValueError: mbkern: the objective's share is 0.985 here, 0.8 to 0.985 elsewhere",
        "ValueError: mbkern: another rank's arguments are refused",
    ]
    assert there[2:] == [
        "KeyError: 'for a reason of its own'",
        "ValueError: mbkern: the objective's share is 0.8 here, 0.8 to 0.985 elsewhere",
        "TypeError: mbkern: noise_scale must be a number, not Tensor",
    ]
