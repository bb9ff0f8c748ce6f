"""Which parameters an accumulator has, and what it keeps for them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mbkern


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))


def _assign(net: nn.Sequential) -> None:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def _replace(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())


def _extend(net: nn.Sequential) -> None:
    net.append(nn.Linear(1, 1, bias=False))


@pytest.mark.parametrize("change", [_assign, _replace, _extend])
def test_parameters_that_are_new_in_a_module_are_an_error(
    change: Callable[[nn.Sequential], None],
) -> None:
    net = _net()
    accumulator = mbkern.GradAccumulator(net)
    change(net)
    x = torch.ones(5, 3)
    with pytest.raises(RuntimeError, match=r"does not know: .*weight.*call add\(module\)"):
        accumulator.backward(net(x).sum(), count=5)
    net.zero_grad(set_to_none=True)
    accumulator.add(net)
    for _ in range(4):
        accumulator.backward(net(x).sum(), count=5)
    stats = accumulator.flush()
    assert set(stats.squared_norms) == set(dict(net.named_parameters()))
    got = [parameter.grad for parameter in net.parameters()]
    expected = torch.autograd.grad(net(x).sum() / 5, list(net.parameters()))
    torch.testing.assert_close(got, list(expected))


def test_a_parameter_replaced_in_mid_window_is_an_error_at_its_end() -> None:
    net = _net()
    accumulator = mbkern.GradAccumulator(net)
    accumulator.backward(net(torch.ones(5, 3)).sum(), count=5)
    _replace(net)
    with pytest.raises(RuntimeError, match=r"does not know: 0\.weight"):
        accumulator.flush()
    accumulator.add(net)  # what the old one had stays its own
    assert set(accumulator.flush().squared_norms) == {"0.weight", "1.weight"}


def test_modules_with_parameters_of_one_name_are_kept_apart() -> None:
    one, two = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    accumulator = mbkern.GradAccumulator(one)
    accumulator.add(two)
    accumulator.add(one)  # nothing is new
    both = copy.deepcopy([one, two, accumulator])
    for a, b, own in ([one, two, accumulator], both):
        own.backward(a(torch.ones(1, 2)).sum() + b(torch.ones(1, 2)).sum(), count=1)
        assert set(own.flush().squared_norms) == {"weight", "weight (2)"}


def test_a_copy_knows_the_copied_module() -> None:
    net = _net()
    accumulator = mbkern.GradAccumulator(net)
    other, own = copy.deepcopy((net, accumulator))
    _replace(other)
    accumulator.backward(net(torch.ones(1, 3)).sum(), count=1)
    with pytest.raises(RuntimeError, match="does not know"):
        own.backward(other(torch.ones(1, 3)).sum(), count=1)


def _memory(accumulator: mbkern.GradAccumulator) -> int:
    return sum(b.numel() for slot in accumulator._members.slots for b in slot.buffers)


@pytest.mark.parametrize("layout", ["flat", "parameter"])
def test_frozen_parameters_have_no_buffers(layout: str) -> None:
    net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2))
    net[0].requires_grad_(False)
    net.register_parameter("code", nn.Parameter(torch.zeros(4, dtype=torch.uint8), False))
    net.register_parameter("wave", nn.Parameter(torch.zeros(4, dtype=torch.complex64), False))
    accumulator = mbkern.GradAccumulator(net, layout=layout)
    assert _memory(accumulator) == 202
    x = torch.randn(4, 100)

    def window() -> list[Tensor | None]:
        for part in x.split(1):
            accumulator.backward(net(part).sum(), count=1)
        stats = accumulator.flush()
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        assert list(stats.squared_norms) == trained
        return [p.grad for p in net.parameters() if p.requires_grad]

    window()
    assert net[0].weight.grad is None
    net[0].requires_grad_(True)
    got = window()
    assert _memory(accumulator) == 202 + 10100
    trained = [p for p in net.parameters() if p.requires_grad]
    torch.testing.assert_close(got, list(torch.autograd.grad(net(x).sum() / 4, trained)))


def test_what_is_unfrozen_is_checked_then() -> None:
    wave = nn.Parameter(torch.zeros(2, dtype=torch.complex64), False)
    p = nn.Parameter(torch.zeros(2))
    accumulator = mbkern.GradAccumulator([p, wave])
    wave.requires_grad_(True)
    with pytest.raises(TypeError, match="complex parameters are not supported"):
        accumulator.backward(p.sum(), count=1)
    wave.requires_grad_(False)
    accumulator.backward(p.sum(), count=1)
    assert accumulator.flush().norm.item() == pytest.approx(2**0.5)


def test_the_order_of_the_norm_does_not_depend_on_freezing() -> None:
    def norm(frozen: bool) -> Tensor:
        torch.manual_seed(1)
        net = nn.Sequential(*(nn.Linear(50, 50) for _ in range(4)))
        net[1].requires_grad_(not frozen)
        accumulator = mbkern.GradAccumulator(net)
        net.requires_grad_(True)
        accumulator.backward(net(torch.randn(3, 50)).square().sum(), count=3)
        return accumulator.flush().norm

    assert torch.equal(norm(frozen=True), norm(frozen=False))


def test_state_of_frozen_and_unfrozen_parameters() -> None:
    def build(frozen: bool) -> tuple[nn.Sequential, mbkern.GradAccumulator]:
        torch.manual_seed(1)
        net = _net()
        net[0].requires_grad_(not frozen)
        return net, mbkern.GradAccumulator(net)

    for saved_frozen in (False, True):
        for loaded_frozen in (False, True):
            net, accumulator = build(saved_frozen)
            accumulator.backward(net(torch.ones(1, 3)).sum(), count=1)
            state = accumulator.state_dict()
            want = accumulator.flush().norm
            _, again = build(loaded_frozen)
            again.load_state_dict(state)
            assert torch.equal(again.flush().norm, want)


# ---- statistics ----------------------------------------------------------------------------------


def test_the_share_of_clipped_windows() -> None:
    p = nn.Parameter(torch.zeros(1))
    accumulator = mbkern.GradAccumulator([p], max_norm=1.0)
    for size, share in ((2.0, 1.0), (0.5, 0.5), (float("nan"), 0.5), (0.5, 1 / 3)):
        accumulator.backward((p * size).sum(), count=1)
        assert accumulator.flush().clipped_share.item() == pytest.approx(share)
    assert accumulator.flush().clipped_share.item() == pytest.approx(1 / 3)  # nothing in it
    again = mbkern.GradAccumulator([p], max_norm=1.0)
    p.grad = None
    again.load_state_dict(accumulator.state_dict())
    again.backward((p * 3).sum(), count=1)
    assert again.flush().clipped_share.item() == 0.5
    assert mbkern.GradAccumulator([p], max_norm=None).flush().clipped_share is None


def test_a_window_without_anything_is_not_clipped() -> None:
    p = nn.Parameter(torch.zeros(1))
    assert mbkern.GradAccumulator([p], max_norm=1.0).flush().clip_factor.item() == 1
    assert mbkern.flush_([], []).clip_factor.item() == 1


@pytest.mark.parametrize("noise_scale", [False, True])
def test_what_a_kernel_adds_is_measured(noise_scale: bool) -> None:
    """As if autograd had brought it."""
    torch.manual_seed(3)
    w, body = nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(7))
    gradients = torch.randn(6, 40) + 1, torch.randn(6, 7) + 1

    def run(by_kernel: bool) -> mbkern.WindowStats:
        accumulator = mbkern.GradAccumulator([w, body], measure=True, noise_scale=noise_scale)
        for of_w, of_body in zip(*gradients, strict=True):
            with accumulator.micro_batch(count=2):
                if by_kernel:
                    accumulator.buffer(w).add_(of_w)
                else:
                    (w * of_w).sum().backward()
                (body * of_body).sum().backward()
        stats = accumulator.flush()
        accumulator.close()
        return stats

    kernel = run(by_kernel=True)
    got = w.grad
    w.grad = body.grad = None
    autograd = run(by_kernel=False)
    torch.testing.assert_close(got, w.grad)
    w.grad = body.grad = None
    torch.testing.assert_close(kernel.micro_batch_norms(), autograd.micro_batch_norms())
    if noise_scale:
        torch.testing.assert_close(kernel.noise_scale, autograd.noise_scale)
        assert kernel.suggested_batch.item() == math.ceil(kernel.noise_scale.item())


def test_what_a_kernel_adds_apart_is_dropped_with_its_micro_batch() -> None:
    w = nn.Parameter(torch.zeros(4))
    accumulator = mbkern.GradAccumulator([w], measure=True)
    with accumulator.micro_batch(count=1):
        accumulator.buffer(w).add_(1.0)

    def failing() -> None:
        with accumulator.micro_batch(count=1):
            accumulator.buffer(w).add_(100.0)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    stats = accumulator.flush()  # the window is whole: nothing of it had been added
    assert w.grad.tolist() == [1, 1, 1, 1]
    assert [norm.item() for norm in stats.micro_batch_norms()] == [2]


def test_norms_that_were_not_measured_are_refused() -> None:
    w = nn.Parameter(torch.zeros(4))
    accumulator = mbkern.GradAccumulator([w], measure=True)
    accumulator.buffer(w).add_(1.0)  # between micro-batches
    accumulator.backward(w.sum(), count=1)
    stats = accumulator.flush()
    assert w.grad.tolist() == [2, 2, 2, 2]
    with pytest.raises(RuntimeError, match="not every gradient of the window was measured"):
        stats.micro_batch_norms()
    w.grad = None
    plain = mbkern.GradAccumulator([w])
    plain.backward(w.sum(), count=1)
    with pytest.raises(RuntimeError, match="measure=True is missing"):
        plain.flush().micro_batch_norms()


def test_the_noise_scale_with_a_grad_scaler() -> None:
    """The loss scale is divided out of the norms; one that is off changes nothing."""

    def run(scaler: torch.amp.GradScaler | None) -> Tensor:
        g = torch.Generator().manual_seed(5)
        p = nn.Parameter(torch.zeros(30))
        optimizer = torch.optim.SGD([p], lr=0.0)
        accumulator = mbkern.GradAccumulator([p], noise_scale=True)
        for _ in range(3):
            for _ in range(4):
                loss = (torch.randn(5, 30, generator=g) + 1).sum(0) @ p
                accumulator.backward(loss if scaler is None else scaler.scale(loss), count=5)
            if scaler is None:
                stats = accumulator.flush()
                optimizer.step()
            else:
                stats = accumulator.flush(scaler=scaler, optimizer=optimizer)
                scaler.step(optimizer)
                scaler.update()
        assert stats.noise_scale is not None
        return stats.noise_scale

    plain = run(None)
    assert torch.equal(run(torch.amp.GradScaler("cpu", enabled=False)), plain)
    torch.testing.assert_close(run(torch.amp.GradScaler("cpu", init_scale=1024.0)), plain)
