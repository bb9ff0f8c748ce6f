"""The gradient noise scale of a problem whose covariance is known."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
import torch

import mbkern

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("sizes", [[8] * 8, [1, 30, 3, 9, 21, 0]])
def test_known_covariance(sizes: list[int]) -> None:
    """Loss sum_i <p, v_i> with v_i ~ N(G, diag(s^2)): the gradient is the sum of the v_i."""
    g = torch.Generator().manual_seed(5)
    mean = torch.linspace(-1, 1, 400)
    spread = torch.linspace(0.5, 3, 400)
    exact = spread.square().sum() / mean.square().sum()
    p = torch.nn.Parameter(torch.zeros(400))
    accumulator = mbkern.GradAccumulator([p], measure=True)
    scale = mbkern.NoiseScale(decay=0.995)
    for _ in range(200):
        for n in sizes:
            v = mean + spread * torch.randn(n, 400, generator=g)
            accumulator.backward((v @ p).sum(), count=n)
        accumulator.flush().update(scale)
    assert abs(scale.noise_scale / exact - 1) < 0.05
    assert abs(scale.variance / spread.square().sum() - 1) < 0.05
    again = mbkern.NoiseScale(decay=0.995)
    again.load_state_dict(scale.state_dict())
    assert torch.equal(again.noise_scale, scale.noise_scale)
    assert "items" in repr(scale)


def test_windows_that_say_nothing() -> None:
    scale = mbkern.NoiseScale()
    assert scale.noise_scale.isnan()
    p = torch.nn.Parameter(torch.zeros(3))
    accumulator = mbkern.GradAccumulator([p], measure=True)
    accumulator.backward((p * torch.ones(3)).sum(), count=4)
    accumulator.flush().update(scale)  # one micro-batch
    assert scale.noise_scale.isnan()
    for value in (1.0, float("inf")):
        accumulator.backward((p * value).sum(), count=4)
    accumulator.flush().update(scale)
    assert scale.noise_scale.isnan()
    with pytest.raises(ValueError, match="decay"):
        mbkern.NoiseScale(decay=1.0)
    accumulator.close()
    p.grad = None
    plain = mbkern.GradAccumulator([p])
    plain.backward(p.sum(), count=1)
    with pytest.raises(ValueError, match="measure=True"):
        plain.flush().update(scale)
    plain.close()


def test_kept_by_the_accumulator() -> None:
    """noise_scale=True takes every window in that says something, and goes along with the state."""
    p = torch.nn.Parameter(torch.zeros(50))
    accumulator = mbkern.GradAccumulator([p], noise_scale=True)
    by_hand = mbkern.NoiseScale()
    g = torch.Generator().manual_seed(2)

    def window(parts: int) -> mbkern.WindowStats:
        for _ in range(parts):
            accumulator.backward((torch.randn(6, 50, generator=g) + 1).sum(0) @ p, count=6)
        return accumulator.flush()

    for parts in (4, 3):
        stats = window(parts)
        stats.update(by_hand)
        assert torch.equal(stats.noise_scale, by_hand.noise_scale)
    assert torch.equal(window(1).noise_scale, by_hand.noise_scale)
    assert torch.equal(accumulator.flush().noise_scale, by_hand.noise_scale)  # nothing in it
    accumulator.buffer(p).add_(1.0)  # a kernel's own: not measured
    accumulator.backward(p.sum(), count=6)
    assert torch.equal(accumulator.flush().noise_scale, by_hand.noise_scale)
    state = accumulator.state_dict()
    accumulator.close()
    p.grad = None
    again = mbkern.GradAccumulator([p], noise_scale=True)
    again.load_state_dict(state)
    assert torch.equal(again.noise_scale.noise_scale, by_hand.noise_scale)
    again.close()
    assert mbkern.GradAccumulator([p]).flush().noise_scale is None


@pytest.mark.parametrize(
    "arguments", [{"l2": 0.1}, {"mode": "known"}, {"denominators": ("a", "b")}]
)
def test_what_the_noise_scale_does_not_go_with(arguments: dict[str, object]) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="noise_scale=True needs"):
        mbkern.GradAccumulator([p], noise_scale=True, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not go with penalties"):
        mbkern.GradAccumulator([{"params": [p], "l1": 0.1}], noise_scale=True)


def test_what_was_not_measured_stays_so_through_a_state() -> None:
    def parameter() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(3))

    p = parameter()
    plain = mbkern.GradAccumulator([p])
    plain.backward(p.sum(), count=2)
    q = parameter()
    measuring = mbkern.GradAccumulator([q], noise_scale=True)
    measuring.load_state_dict(plain.state_dict())
    measuring.backward(q.sum(), count=2)
    measuring.backward((2 * q).sum(), count=2)
    assert measuring.flush().noise_scale.isnan()  # its first micro-batch was not measured

    r = parameter()
    twice = mbkern.GradAccumulator([r], measure=True)
    with twice.micro_batch(count=2):
        r.sum().backward()
        r.sum().backward()
    twice.load_state_dict(twice.state_dict())
    assert twice.flush().repeated


def test_counts_left_out_stay_so_through_a_state() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    known = mbkern.GradAccumulator([p], mode="known")
    known.begin(total=8)
    known.backward(p.sum())
    known.load_state_dict(known.state_dict())
    known.backward(p.sum(), count=4)
    known.flush()
    assert (p.grad == 0.25).all()


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(30))
def test_random_windows_against_fractions(seed: int) -> None:
    """The two equations of the module's docstring, solved and averaged exactly."""
    rng = random.Random(seed)
    scale = mbkern.NoiseScale(decay := rng.choice([0.0, 0.5, 0.99]))
    sums = [Fraction(0)] * 3
    for _ in range(rng.randint(1, 8)):
        counts = [rng.choice([0, 1, 2, 3, 7, 100, 0.5, 1e6]) for _ in range(rng.randint(0, 6))]
        norms = [rng.random() * 10 ** rng.uniform(-6, 6) * (n > 0) for n in counts]
        if norms and rng.random() < 0.1:
            norms[0] = rng.choice([math.inf, math.nan])
        whole = rng.random() * 10 ** rng.uniform(-6, 6)
        scale.update(
            [number(value) for value in norms],
            [rng.choice([n, torch.tensor(n)]) for n in counts], number(whole), sum(counts),
        )  # fmt: skip
        n = [Fraction(n) for n in counts if n]
        if len(n) < 2 or not all(map(math.isfinite, norms)):
            continue
        squares = [Fraction(v) for v, count in zip(norms, counts, strict=True) if count]
        mean = sum(v / k**2 for v, k in zip(squares, n, strict=True)) / len(n)
        variance = (mean - Fraction(whole)) / (sum(1 / k for k in n) / len(n) - 1 / sum(n))
        new = (Fraction(whole) - variance / sum(n), variance, Fraction(1))
        mixed = zip(sums, new, strict=True)
        sums = [Fraction(decay) * a + (1 - Fraction(decay)) * b for a, b in mixed]
    if not sums[2]:
        assert scale.noise_scale.isnan()
        return
    square, variance = (float(value / sums[2]) for value in sums[:2])
    assert scale.squared_gradient.item() == pytest.approx(square, rel=1e-6)
    assert scale.variance.item() == pytest.approx(variance, rel=1e-6)
    suggested = scale.suggested_batch.item()
    if square > 0 and variance > 0:
        assert suggested == pytest.approx(math.ceil(variance / square), rel=1e-6, abs=1)
    else:
        assert math.isnan(suggested)


def test_two_negative_estimates_are_no_noise_scale() -> None:
    """Windows of uneven sizes may give both: their quotient, 26 items, was suggested as a batch."""
    scale = mbkern.NoiseScale(decay=0.0)
    scale.load_state_dict({"sums": torch.tensor([-3.85, -100.0, 1.0]).double()})
    assert scale.noise_scale.isnan()
    assert scale.suggested_batch.isnan()
    scale.load_state_dict({"sums": torch.tensor([-3.85, 100.0, 1.0]).double()})
    assert scale.noise_scale < 0
    assert scale.suggested_batch.isnan()


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "is a dict, not NoneType"),
        ({}, ValueError, "has no 'sums'"),
        ({"sums": [1.0, 2.0, 3.0]}, TypeError, "not list"),
        ({"sums": torch.ones(2)}, ValueError, r"\(2,\)"),
        ({"sums": torch.ones(3, dtype=torch.int64)}, ValueError, "int64"),
        ({"sums": torch.ones(3, device="meta")}, ValueError, "meta"),
    ],
)
def test_no_state_of_a_noise_scale(state: Any, error: type[Exception], message: str) -> None:
    scale = mbkern.NoiseScale()
    scale.load_state_dict({"sums": torch.tensor([1.0, 4.0, 1.0])})
    with pytest.raises(error, match=f"^mbkern: .*{message}"):
        scale.load_state_dict(state)
    assert scale.noise_scale == 4


def test_updates_that_are_refused_and_keep_no_graph() -> None:
    scale, one = mbkern.NoiseScale(), torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"^mbkern: squared norms of 1 micro-.* counts of 2"):
        scale.update([one], [1, 2], one, 3)
    with pytest.raises(TypeError, match=r"^mbkern: a squared norm is a tensor, not float"):
        scale.update([one, 1.0], [1, 2], one, 3)  # type: ignore[list-item]
    for norms, total in (([torch.ones(2), one], one), ([one, one], torch.ones(2))):
        with pytest.raises(ValueError, match=r"^mbkern: a squared norm is .* not \(2,\)"):
            scale.update(norms, [1, 2], total, 3)
    for count in ("1", None, -1, float("nan"), torch.ones(2)):
        with pytest.raises(ValueError, match=r"^mbkern: count "):
            scale.update([one, one], [count, 2], one, 3)  # type: ignore[list-item]
        with pytest.raises(ValueError, match=r"^mbkern: total "):
            scale.update([one, one], [1, 2], one, count)  # type: ignore[arg-type]
    assert scale.noise_scale.isnan()
    with pytest.raises(TypeError, match=r"^mbkern: decay must be a number, not str"):
        mbkern.NoiseScale("0.9")  # type: ignore[arg-type]
    scale.update([one * 2, one * 3], [1, 2], one, 3)
    assert not scale.variance.requires_grad  # or all windows' graphs would stay
