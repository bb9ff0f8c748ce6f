"""mbkern.GradAccumulator: every cut of a window gives the gradient of the full batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from windows import CUTS, MODES, Problem, gradients, model, run

import mbkern
from mbkern import GradAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test says otherwise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["classes", "padding", "packed", "weighted"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut_is_the_full_batch(kind: str, mode: str, cut: list[int]) -> None:
    problem = Problem(kind)
    for dtype in (torch.float64, torch.float32):
        net = model(dtype)
        exact = problem.full(copy.deepcopy(net).double())
        acc = GradAccumulator(net, mode=mode)
        run(acc, net, problem, cut)
        stats = acc.flush()
        # fp64: 1e-12. fp32: each of at most 23 sums of at most 161 terms, and the model's own
        # rounding, far below 200 units of the largest gradient.
        bound = 1e-12 if dtype == torch.float64 else 200 * 2.0**-24
        for p, e in zip(net.parameters(), exact, strict=True):
            assert p.grad is not None
            assert (p.grad - e).abs().max() <= bound * e.abs().max()
        norm = torch.stack([e.square().sum() for e in exact]).sum().sqrt()
        assert abs(stats.norm - norm) <= bound * norm
        assert stats.micro_batches == len(cut)


def test_a_mean_of_means_is_wrong() -> None:
    """The test above can fail: what people write without an accumulator."""
    problem, net = Problem("padding"), model()
    exact = problem.full(net)
    for rows in problem.parts([9, 6, 4, 4]):
        loss, count = problem.loss(net, rows)
        (loss / count.clamp(min=1) / 4).backward()
    worst = max(
        float((p.grad - e).abs().max() / e.abs().max())
        for p, e in zip(net.parameters(), exact, strict=True)
    )
    assert worst > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_two_denominators(mode: str) -> None:
    problem, net = Problem("padding"), model()

    def losses(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        ce, count = problem.loss(net, rows)
        return ce, count, net[0](problem.x[rows]).square().sum()

    ce, count, aux = losses(slice(None))
    parameters = list(net.parameters())
    exact = torch.autograd.grad(ce / count + aux / 23, parameters, allow_unused=True)
    for cut in CUTS:
        acc = GradAccumulator(net, mode=mode, denominators=("ce", "aux"))
        if mode == "known":
            acc.begin({"ce": count, "aux": 23})
        for rows in problem.parts(cut):
            ce, n, aux = losses(rows)
            acc.backward(aux, count=rows.stop - rows.start, denominator="aux")
            ce, n, _ = losses(rows)
            acc.backward(ce, count=n, denominator="ce")
        stats = acc.flush()
        assert stats.counts["aux"] == 23
        for p, e in zip(parameters, exact, strict=True):
            assert (p.grad - e).abs().max() <= 1e-12 * e.abs().max()
        acc.close()
        net.zero_grad()


def test_undeclared_denominator() -> None:
    acc = GradAccumulator(model(), denominators=("ce", "aux"))
    with pytest.raises(ValueError, match=r"'other' is not declared.*\['ce', 'aux'\]"):
        acc.backward(torch.zeros((), requires_grad=True), 1, "other")
    with pytest.raises(ValueError, match="'' is not declared"):
        acc.backward(torch.zeros((), requires_grad=True), 1)


def test_streaming_is_valid_after_each_micro_batch() -> None:
    problem = Problem("padding")
    net, other = model(torch.float32), model(torch.float32)
    acc = GradAccumulator(net, mode="streaming")
    for rows in problem.parts([9, 6, 4, 4]):
        loss, count = problem.loss(net, rows)
        acc.backward(loss, count)
        so_far = GradAccumulator(other)
        for before in problem.parts([9, 6, 4, 4]):
            if before.stop <= rows.stop:
                loss, count = problem.loss(other, before)
                so_far.backward(loss, count)
        so_far.flush()
        assert all(torch.equal(a, b) for a, b in zip(gradients(net), gradients(other), strict=True))
        so_far.close()
        other.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_bits_for_every_layout_and_thread_count(isa: str, dtype: torch.dtype) -> None:
    results = []
    threads = torch.get_num_threads()
    grads = [[torch.randn_like(p) for p in model(dtype).parameters()] for _ in range(3)]
    try:
        for layout in ("flat", "parameter"):
            for count in (1, 2):
                torch.set_num_threads(count)
                net = model(dtype)
                acc = GradAccumulator(net, layout=layout, max_norm=0.5, l1=0.01, l2=0.1)
                for micro in grads:
                    with acc.micro_batch(count=7):
                        torch.autograd.backward(list(net.parameters()), micro)
                stats = acc.flush()
                results.append([*gradients(net), stats.norm, stats.penalty])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_512_micro_batches_in_bf16() -> None:
    """Before the final cast, against fp64: 1e-6; torch's bf16 gradients lose about 2e-2."""
    p = nn.Parameter(torch.zeros(4000, dtype=torch.bfloat16))
    acc = GradAccumulator([p], into="main_grad")
    exact, plain = torch.zeros(4000, dtype=torch.float64), torch.zeros_like(p)
    random = torch.Generator().manual_seed(0)
    for _ in range(512):
        grad = (torch.randn(4000, generator=random) + 0.2).bfloat16()
        exact += grad.double()
        plain += grad
        with acc.micro_batch(count=1):
            p.backward(grad)
    acc.flush()
    exact /= 512
    assert p.main_grad.dtype == torch.float32
    assert (p.main_grad - exact).norm() <= 1e-6 * exact.norm()
    assert (plain.double() / 512 - exact).norm() >= 1e-3 * exact.norm()


def test_penalties_and_clipping_of_groups() -> None:
    problem, net = Problem("classes"), model()
    groups = [
        {"params": [net[0].weight, net[3].weight], "l2": 0.3},
        {"params": list(net[2].parameters()), "l1": 0.1, "l2": 0.0},
        {"params": [net[0].bias, net[3].bias]},
    ]
    acc = GradAccumulator(groups, l2=0.01, max_norm=0.2)
    run(acc, net, problem, [20, 3])
    stats = acc.flush()
    loss, count = problem.loss(net, slice(None))
    value = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for p in group["params"]:
            value = value + group.get("l1", 0.0) * p.abs().sum()
            value = value + group.get("l2", 0.01) / 2 * p.square().sum()
    exact = torch.autograd.grad(loss / count + value, list(net.parameters()))
    norm = torch.stack([e.square().sum() for e in exact]).sum().sqrt()
    assert abs(stats.norm - norm) <= 1e-12 * norm
    assert abs(stats.penalty - value) <= 1e-12 * value
    for p, e in zip(net.parameters(), exact, strict=True):
        assert torch.allclose(p.grad, e * 0.2 / (norm + 1e-6), rtol=1e-11, atol=1e-15)


def test_nothing_counted_and_empty_windows() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    assert acc.flush().norm == 0
    assert gradients(net) == [None] * 6
    acc.backward(net(torch.zeros(0, 6)).sum(), count=torch.tensor(0))
    acc.flush()
    assert all((g == 0).all() for g in gradients(net))


def test_parameters_without_gradient_frozen_shared_added() -> None:
    net = model(torch.float32)
    net[3].bias.requires_grad_(False)
    unused, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    acc = GradAccumulator([*net.parameters(), net[0].weight, unused])
    acc.backward(net(torch.ones(2, 6)).sum(), 2)
    acc.flush()
    assert unused.grad is None
    assert net[3].bias.grad is None
    net[3].bias.requires_grad_(True)
    acc.add([late, unused])
    acc.backward(net(torch.ones(2, 6)).sum() + late.sum(), 2)
    acc.flush()
    assert torch.equal(net[3].bias.grad, torch.ones(5))
    assert torch.equal(late.grad, torch.full((2,), 0.5))

    tied = nn.Linear(4, 4, bias=False)
    acc = GradAccumulator(tied)
    acc.backward(tied(tied(torch.ones(1, 4))).sum(), 1)
    got = acc.flush()
    exact = torch.autograd.grad(tied(tied(torch.ones(1, 4))).sum(), tied.weight)[0]
    assert torch.equal(tied.weight.grad, exact)
    assert list(got.squared_norms) == ["weight"]


def test_gradients_are_freed_and_buckets_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbkern import _accumulator_collect

    parameters = [nn.Parameter(torch.ones(1000)) for _ in range(20)]
    acc = GradAccumulator(parameters)
    held: list[int] = []
    launches: list[int] = []
    add = _accumulator_collect.accumulate_

    def counting(buffers: list[Tensor], *args: Any, **options: Any) -> Any:
        launches.append(len(buffers))
        return add(buffers, *args, **options)

    monkeypatch.setattr(_accumulator_collect, "accumulate_", counting)
    monkeypatch.setattr(_accumulator_collect, "BUCKET_BYTES", 16_000)
    for p in parameters:
        p.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(q.grad is not None for q in parameters))
        )
    acc.backward(sum((k * p).sum() for k, p in enumerate(parameters)), 1)
    assert max(held) == 0, "our hook comes first, and leaves no gradient"
    assert launches == [4] * 5
    acc.flush()
    assert all((p.grad == k).all() for k, p in enumerate(parameters))


def test_buffer_for_a_kernel_that_adds_itself() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    acc = GradAccumulator([p, q])
    for _ in range(2):
        for _ in range(2):
            with acc.micro_batch(count=2):
                q.sum().backward()
                mbkern.accumulate_(acc.buffer(p), torch.full((3,), 6.0))
        acc.flush()
        assert (p.grad == 3).all()
        assert (q.grad == 0.5).all()
    with pytest.raises(KeyError):
        acc.buffer(torch.ones(3))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_fp32_gradients_of_bf16_parameters() -> None:
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    acc = GradAccumulator([p], into="fp32_grad")
    for _ in range(2):
        acc.backward((p * 1.5).sum(), 7)
        acc.backward((p * 0.25).sum(), 7)
        acc.flush()
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, torch.full((5,), 1.75) * torch.tensor(1 / 14))


def test_layouts_and_compiled_settings() -> None:
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    acc = GradAccumulator(net)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    from torch.utils.checkpoint import checkpoint

    acc.backward(checkpoint(net, x, use_reentrant=False).square().sum(), 2)
    acc.flush()
    exact = torch.autograd.grad(net(x).square().sum() / 2, list(net.parameters()))
    assert all(
        torch.allclose(p.grad, e, rtol=1e-4, atol=1e-4)
        for p, e in zip(net.parameters(), exact, strict=True)
    )
    assert net.weight.grad.stride() == net.weight.stride()
