"""mbkern.GradAccumulator: every cut of a window gives the gradient of the full batch."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbkern
from mbkern import GradAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test says otherwise
CUTS = ([23], [1] * 23, [9, 6, 4, 4], [20, 3], [2, 21])
MODES = ("deferred", "streaming", "known")


def model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


class Problem:
    """A mini-batch of 23 samples of 7 positions, its loss as a sum, and the count of that sum."""

    def __init__(self, kind: str) -> None:
        random = torch.Generator().manual_seed(1)
        self.kind = kind
        self.x = torch.randn(23, 7, 6, generator=random, dtype=torch.float64)
        self.target = torch.randint(5, (23, 7), generator=random)
        self.weight = torch.rand(23, generator=random, dtype=torch.float64)
        if kind == "padding":
            lengths = torch.randint(0, 8, (23,), generator=random)
            self.target[torch.arange(7)[None] >= lengths[:, None]] = -100
            self.target[3:5] = -100  # a micro-batch without a token
        elif kind == "packed":
            self.target[torch.rand(23, 7, generator=random) < 0.2] = -100

    def loss(self, net: nn.Module, rows: slice) -> tuple[Tensor, Tensor]:
        out, target = net(self.x[rows].to(next(net.parameters()).dtype)), self.target[rows]
        if self.kind == "classes":
            out, target = out.mean(1), target[:, 0]
            return F.cross_entropy(out, target, reduction="sum"), torch.tensor(len(target))
        if self.kind == "weighted":
            per_item = F.cross_entropy(out.mean(1), target[:, 0], reduction="none")
            w = self.weight[rows].to(per_item.dtype)
            return (w * per_item).sum(), w.sum()
        loss = F.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="sum")
        return loss, (target != -100).sum()

    def parts(self, cut: list[int]) -> Iterator[slice]:
        begin = 0
        for size in cut:
            yield slice(begin, begin + size)
            begin += size

    def full(self, net: nn.Module) -> list[Tensor]:
        loss, count = self.loss(net, slice(None))
        return list(torch.autograd.grad(loss / count, list(net.parameters())))


def run(acc: GradAccumulator, net: nn.Module, problem: Problem, cut: list[int]) -> None:
    if acc.mode == "known":
        acc.begin(problem.loss(net, slice(None))[1])
    for rows in problem.parts(cut):
        loss, count = problem.loss(net, rows)
        acc.backward(loss, count=count)


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


def test_others_may_zero_gradients() -> None:
    net = model(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    acc = GradAccumulator(net)
    for to_none in (True, False):
        acc.backward(net(torch.ones(2, 6)).sum(), 2)
        optimizer.zero_grad(set_to_none=to_none)
        acc.backward(net(torch.ones(3, 6)).sum(), 3)
        acc.flush()
        exact = torch.autograd.grad(net(torch.ones(1, 6)).sum(), list(net.parameters()))
        for g, e in zip(gradients(net), exact, strict=True):
            assert torch.allclose(g, e, rtol=1e-5, atol=1e-6)


def test_somebody_elses_gradient_is_refused() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    net(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient that is not"):
        acc.backward(net(torch.ones(2, 6)).sum(), 2)


def test_backwards_outside_are_left_alone() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    net(torch.ones(2, 6)).sum().backward()
    assert all(g is not None for g in gradients(net))
    acc.close()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("planted")


def failing_loss(net: nn.Module) -> Tensor:
    """Its backward fails after the gradients of the last layer."""
    return net[3](Failing.apply(net[:3](torch.ones(2, 6)))).sum()


def test_exception_before_anything_was_added() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    acc.backward(net(torch.ones(2, 6)).sum(), 2)
    with pytest.raises(KeyError, match="planted"):
        acc.backward(failing_loss(net), 2)  # the head's gradients were in a bucket
    with pytest.raises(ZeroDivisionError), acc.micro_batch(count=5):
        1 / 0  # noqa: B018
    assert gradients(net) == [None] * 6
    assert acc.flush().counts == {"": 2}
    exact = torch.autograd.grad(net(torch.ones(1, 6)).sum(), list(net.parameters()))
    for g, e in zip(gradients(net), exact, strict=True):
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-6)


def test_exception_after_something_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbkern import _accumulator_collect

    monkeypatch.setattr(_accumulator_collect, "BUCKET_BYTES", 1)
    net = model(torch.float32)
    acc = GradAccumulator(net)
    with pytest.raises(KeyError, match="planted"):
        acc.backward(failing_loss(net), 2)
    for use in (acc.flush, acc.state_dict, lambda: acc.backward(net(torch.ones(2, 6)).sum(), 2)):
        with pytest.raises(RuntimeError, match=r"micro-batch 0 failed \(KeyError.*after 2 of its"):
            use()
    acc.keep_partial()
    acc.flush()
    assert net[3].weight.grad is not None
    assert net[0].weight.grad is None
    with pytest.raises(KeyError):
        acc.backward(failing_loss(net), 2)
    acc.reset()
    acc.flush()
    assert gradients(net) == [None] * 6


@pytest.mark.parametrize("mode", ["deferred", "known"])
def test_resume_has_the_same_bits(mode: str) -> None:
    problem = Problem("padding")
    nets = [model(torch.float32) for _ in range(3)]
    parts = list(problem.parts([9, 6, 4, 4]))

    def feed(acc: GradAccumulator, net: nn.Module, rows: list[slice]) -> None:
        for part in rows:
            acc.backward(*problem.loss(net, part))

    whole, first, second = (GradAccumulator(net, mode=mode) for net in nets)
    if mode == "known":
        total = problem.loss(nets[0], slice(None))[1]
        whole.begin(total)
        first.begin(total)
    feed(whole, nets[0], parts)
    feed(first, nets[1], parts[:2])
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    feed(second, nets[2], parts[2:])
    a, b = whole.flush(), second.flush()
    assert torch.equal(a.norm, b.norm)
    assert a.micro_batches == b.micro_batches == 4
    assert all(
        torch.equal(x, y) for x, y in zip(gradients(nets[0]), gradients(nets[2]), strict=True)
    )


def test_wrong_states_are_refused() -> None:
    state = GradAccumulator(model()).state_dict()
    with pytest.raises(ValueError, match=r"other parameters; only there: \['0\.bias'"):
        GradAccumulator([nn.Parameter(torch.ones(2))]).load_state_dict(state)
    with pytest.raises(ValueError, match="another accumulator"):
        GradAccumulator(model(), mode="streaming").load_state_dict(state)
    net = model()
    acc = GradAccumulator(net)
    acc.backward(net[0].weight.sum(), 1)
    with pytest.raises(ValueError, match=r"the sums of 0\.weight are .*float64.*float32 on"):
        GradAccumulator(model(torch.float32)).load_state_dict(acc.state_dict())


def scaled_step(overflow: bool) -> tuple[list[Tensor], float, nn.Module]:
    net = model(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    acc = GradAccumulator(net)
    for k in range(3):
        x = torch.full((4, 6), float("inf") if overflow and k == 1 else 0.5)
        acc.backward(scaler.scale(net(x).square().sum()), count=4)
    stats = acc.flush(scaler=scaler, optimizer=optimizer)
    grads = [g.clone() for g in gradients(net) if g is not None]
    scaler.step(optimizer)
    scaler.update()
    assert stats.found_inf == float(overflow)
    return grads, scaler.get_scale(), net


def test_grad_scaler() -> None:
    before = list(model(torch.float32).parameters())
    grads, scale, net = scaled_step(overflow=False)
    assert scale == 2.0**11
    plain = model(torch.float32)
    loss = plain(torch.full((4, 6), 0.5)).square().sum() / 4
    exact = torch.autograd.grad(loss, list(plain.parameters()))
    for p, b, g, e in zip(net.parameters(), before, grads, exact, strict=True):
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-7)
        assert torch.allclose(p, b - e, rtol=1e-5, atol=1e-6), "unscaled twice, or not at all"


def test_grad_scaler_overflow() -> None:
    before = list(model(torch.float32).parameters())
    _, scale, net = scaled_step(overflow=True)
    assert scale == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_grad_scaler_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    acc = GradAccumulator(net)
    with pytest.raises(ValueError, match="needs optimizer="):
        acc.flush(scaler=scaler)
    with pytest.raises(TypeError, match=r"must be a torch\.amp\.GradScaler"):
        acc.flush(scaler=3, optimizer=optimizer)
    acc.backward(net(torch.ones(2, 6)).sum(), 2)
    with pytest.raises(RuntimeError, match="has scaled no loss"):
        acc.flush(scaler=scaler, optimizer=optimizer)
    acc.reset()
    acc.backward(scaler.scale(net(torch.ones(2, 6)).sum()), 2)
    acc.flush(scaler=scaler, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="has unscaled this optimizer"):
        acc.flush(scaler=scaler, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.unscale_(optimizer)
    off = torch.amp.GradScaler("cpu", enabled=False)
    acc.flush(scaler=off, optimizer=optimizer)
    monkeypatch.setattr(torch, "__version__", "3.1.0")
    with pytest.raises(NotImplementedError, match=r"3\.1\.0"):
        acc.flush(scaler=scaler, optimizer=optimizer)


def test_non_finite_names_micro_batch_and_parameter() -> None:
    net = model(torch.float32)
    for measure in (True, False):
        acc = GradAccumulator(net, measure=measure)
        for k in range(3):
            with acc.micro_batch(count=1):
                grads = [torch.ones_like(p) for p in net.parameters()]
                if k == 1:
                    grads[2][3] = float("nan")
                torch.autograd.backward(list(net.parameters()), grads)
        stats = acc.flush()
        assert stats.found_inf == 1
        assert stats.non_finite() == [(1 if measure else -1, "2.weight")]
        if measure:
            norms = torch.stack(stats.micro_batch_norms())
            size = sum(p.numel() for p in net.parameters())
            assert torch.equal(norms[[0, 2]], torch.tensor([size] * 2).double().sqrt())
        acc.close()
        net.zero_grad()


def test_pre_scale_keeps_sums_finite() -> None:
    p = nn.Parameter(torch.ones(8, dtype=torch.float16))
    x = torch.full((8,), 6e4, dtype=torch.float16)
    for pre_scale, good in ((1.0, False), (2.0**-6, True)):
        p.grad = None
        acc = GradAccumulator([p], pre_scale=pre_scale)
        acc.backward(4 * (p * x).float().sum(), count=32)
        assert acc.flush().found_inf == float(not good)
    assert (p.grad == 7500).all()


def test_known_mode_checks_what_was_announced() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net, mode="known")
    with pytest.raises(RuntimeError, match=r"needs begin\(total"):
        acc.backward(net(torch.ones(2, 6)).sum())
    acc.begin(4)
    acc.backward(net(torch.ones(2, 6)).sum(), count=2)
    with pytest.raises(ValueError, match=r"announced a total of 4.*2\.0 were counted"):
        acc.flush()
    with pytest.raises(RuntimeError, match="after 1 micro-batches"):
        acc.begin(4)
    acc.reset()
    acc.begin(0)
    acc.backward(net(torch.zeros(0, 6)).sum())
    acc.flush()
    assert all((g == 0).all() for g in gradients(net))
    with pytest.raises(ValueError, match="total must name"):
        acc.begin({"ce": 1})
    with pytest.raises(RuntimeError, match="this is 'deferred'"):
        GradAccumulator(net).begin(3)


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


def test_sparse_gradients() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    acc = GradAccumulator(table)
    with pytest.raises(TypeError, match=r"gradient of weight has layout torch.sparse_coo"):
        acc.backward(table(torch.tensor([1, 1, 2])).sum(), 1)
    acc = GradAccumulator(table, sparse="densify")
    acc.backward(table(torch.tensor([1, 1, 2])).sum(), 1)
    acc.flush()
    assert table.weight.grad[:, 0].tolist() == [0, 2, 1] + [0] * 7


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


def test_deepcopy_pickle_and_the_end() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    twin = copy.deepcopy(net)
    restored = pickle.loads(pickle.dumps(net))
    for other in (twin, restored):
        other(torch.ones(2, 6)).sum().backward()
        assert all(g is not None for g in gradients(other))
    with acc.micro_batch(count=1):
        twin(torch.ones(2, 6)).sum().backward()
    assert acc.flush().norm == 0
    del acc
    gc.collect()
    net(torch.ones(2, 6)).sum().backward()
    assert all(g is not None for g in gradients(net))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradAccumulator([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), TypeError,
         "complex64.*view_as_real"),
        (lambda: GradAccumulator([torch.ones(2, requires_grad=True) * 2]), ValueError, "no leaf"),
        (lambda: GradAccumulator(["w"]), TypeError, "must be a tensor, not str"),
        (lambda: GradAccumulator([{"parameters": []}]), TypeError, 'dicts with "params"'),
        (lambda: GradAccumulator(model(), mode="eager"), ValueError, "mode must be one of"),
        (lambda: GradAccumulator(model(), layout="x"), ValueError, "layout must be one of"),
        (lambda: GradAccumulator(model(), into="x"), ValueError, "into must be one of"),
        (lambda: GradAccumulator(model(), dtype=torch.bfloat16), ValueError, "one of kahan"),
        (lambda: GradAccumulator(model(), pre_scale=0), ValueError, "must be positive"),
        (lambda: GradAccumulator(model()).backward(torch.ones(2), 1), ValueError, r"0-dim.*\(2,\)"),
        (lambda: GradAccumulator(model()).backward(torch.ones(()), None), ValueError, "needs the"),
        (lambda: GradAccumulator(model()).backward(torch.ones(()), -1), ValueError, "count is -1"),
        (lambda: GradAccumulator(model()).backward(torch.ones(()), torch.ones(2)), ValueError,
         "0-dim tensor"),
    ],
)  # fmt: skip
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
