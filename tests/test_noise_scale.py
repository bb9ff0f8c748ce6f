"""The gradient noise scale of a problem whose covariance is known."""

from __future__ import annotations

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
