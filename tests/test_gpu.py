"""What only a GPU shows: streams, graphs, several devices, that nothing waits or allocates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import Tensor

import mbkern
from mbkern import functional as F

pytestmark = pytest.mark.gpu


@pytest.fixture
def waiting_raises(gpu: torch.device) -> Iterator[None]:
    """Inside, torch raises where it would wait for the device."""
    torch.cuda.synchronize(gpu)
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def everything(x: Tensor, target: Tensor) -> list[Tensor]:
    """One of every way to call cross-entropy and squared error; all results on the device."""
    three = torch.full((), 3.0, device=x.device)
    total = mbkern.LossSum(x.device)
    found = []
    for options in (
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0},
        {"denominator": three, "grad_scale": three},
        {"denominator": torch.tensor(3.0), "grad_scale": torch.tensor(3.0)},
        {"weight": torch.ones(x.shape[1], device=x.device)},
        {"sample_weight": torch.ones(len(x), device=x.device), "inplace": True},
    ):
        for dtype in (torch.float32, torch.bfloat16):
            leaf = x.detach().clone().requires_grad_()
            loss = F.cross_entropy(leaf.to(dtype).mul(1), target, **options)
            (3 * loss.float().sum()).backward()
            assert leaf.grad is not None
            found += [loss.detach(), leaf.grad]
    leaf = x.detach().clone().requires_grad_()
    F.mse_loss(leaf, leaf.detach() * three).backward()
    assert leaf.grad is not None
    found.append(leaf.grad)
    buffer = torch.zeros_like(x)
    loss, grad = mbkern.loss_and_grad(
        "cross_entropy", x, target, grad_out=buffer, accumulate=True, loss_sum=total, scale=three
    )
    total.add(loss.view(1)).merge(mbkern.LossSum(x.device))
    return [*found, loss, grad, total.value(three), total.state]


def arguments(gpu: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator(gpu).manual_seed(seed)
    x = torch.randn(64, 1000, device=gpu, generator=random)
    return x, torch.randint(1000, (64,), device=gpu, generator=random)


def test_nothing_waits(gpu: torch.device, waiting_raises: None) -> None:
    x = torch.zeros(64, 1000, device=gpu)
    target = torch.zeros(64, dtype=torch.int64, device=gpu)
    everything(x, target)
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


def test_a_side_stream(gpu: torch.device) -> None:
    """Kernels run on the current stream, after what was put there."""
    x, target = arguments(gpu)
    want = everything(x, target)
    side, late = torch.cuda.Stream(gpu), torch.zeros_like(x)
    side.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = everything(late, target)
    torch.cuda.synchronize(gpu)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_the_default_stream_is_not_used(gpu: torch.device) -> None:
    """A stream that is busy does not hold up a call on another."""
    x, target = arguments(gpu)
    everything(x, target)
    torch.cuda.synchronize(gpu)
    side, done = torch.cuda.Stream(gpu), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second, on the default stream
    with torch.cuda.stream(side):
        mbkern.loss_and_grad("cross_entropy", x, target)
        done.record()
    done.synchronize()
    assert not torch.cuda.default_stream(gpu).query()


def test_capture_and_replay(gpu: torch.device) -> None:
    """A captured graph computes the bits of a plain call for whatever is put into its inputs."""
    x, target = arguments(gpu)
    side = torch.cuda.Stream(gpu)
    side.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(side):
        everything(x, target)
    torch.cuda.current_stream(gpu).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(x, target)
    for seed in (1, 2):
        fresh_x, fresh_target = arguments(gpu, seed)
        want = everything(fresh_x, fresh_target)
        x.copy_(fresh_x)
        target.copy_(fresh_target)
        graph.replay()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


# Of torch's Dynamo, about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiled_into_graphs(case: Case, gpu: torch.device) -> None:
    """``mode="reduce-overhead"``: what is replayed are kernels, not our Python."""
    compiled = torch.compile(case.function, mode="reduce-overhead")
    for seed in range(4):
        sample = case.sample((32, 100), torch.float32, seed=seed)
        found: list[tuple[Tensor, Tensor]] = []
        functions: list[Callable[..., Tensor]] = [case.function, compiled]
        for function in functions:
            x = sample.input.to(gpu).requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            loss = function(x, sample.target.to(gpu))
            loss.backward()
            assert x.grad is not None
            found.append((loss.detach().clone(), x.grad.clone()))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def test_it_allocates_nothing_itself(gpu: torch.device) -> None:
    """All memory of a call is torch's: what the driver has left changes only with its pool."""
    x, target = arguments(gpu)
    everything(x, target)
    torch.cuda.synchronize(gpu)
    before = torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu)
    allocated = torch.cuda.memory_allocated(gpu)
    for _ in range(20):
        everything(x, target)
    torch.cuda.synchronize(gpu)
    assert torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) == before
    assert torch.cuda.memory_allocated(gpu) == allocated


def test_in_place_needs_no_memory(gpu: torch.device) -> None:
    x = torch.randn(512, 32000, device=gpu)
    target = torch.zeros(512, dtype=torch.int64, device=gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    mbkern.loss_and_grad("cross_entropy", x, target, grad_out=x)
    assert torch.cuda.max_memory_allocated(gpu) - before < x.nbytes / 50


def test_another_device_than_the_current(gpu: torch.device) -> None:
    """The tensors say where a call runs; the current device is as before."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NOT CHECKED: there is one GPU")
    x, target = arguments(gpu)
    want = everything(x, target)
    other = torch.device("cuda", 1 if gpu.index == 0 else 0)
    got = everything(x.to(other), target.to(other))
    assert torch.cuda.current_device() == gpu.index
    for a, b in zip(got, want, strict=True):
        assert a.device == other
        assert torch.equal(a.cpu(), b.cpu())
    mbkern.take_target_errors(gpu)
    F.cross_entropy(x.to(other), torch.full_like(target, 5000, device=other))
    assert mbkern.take_target_errors(gpu).count == 0
    assert mbkern.take_target_errors(other).count == len(x)


@pytest.mark.parametrize("where", ["target", "weight", "grad_out", "loss_sum", "denominator"])
def test_tensors_of_two_devices(where: str, gpu: torch.device) -> None:
    """Refused, with the name of the one that is elsewhere; a scalar may lie on the CPU."""
    x, target = torch.randn(3, 4, device=gpu), torch.arange(3, device=gpu)
    options: dict[str, Any] = {
        "target": {"target": target.cpu()},
        "weight": {"weight": torch.ones(4)},
        "grad_out": {"grad_out": torch.ones(3, 4)},
        "loss_sum": {"loss_sum": mbkern.LossSum()},
        "denominator": {"denominator": torch.ones((), device=gpu)},
    }[where]
    call = {"input": x, "target": target, **options}
    if where == "denominator":  # of a call on the CPU
        call.update(input=x.cpu(), target=target.cpu())
    with pytest.raises(ValueError, match=rf"on one device: {where} is on (cpu|cuda)"):
        mbkern.loss_and_grad("cross_entropy", **call)
    with pytest.raises(ValueError, match="on one device: values is on cpu"):
        mbkern.LossSum(gpu).add(torch.ones(3))


def test_sums_of_two_devices(gpu: torch.device) -> None:
    values = torch.randn(100)
    total = mbkern.LossSum(gpu).merge(mbkern.LossSum().add(values))
    assert torch.equal(total.state.cpu(), mbkern.LossSum().add(values).state)
    back = mbkern.LossSum().merge(total)
    assert torch.equal(back.state, total.state.cpu())


@pytest.mark.parametrize("columns", [10, 100, 1000, 1001, 4096, 20_000, 50_257, 140_000])
def test_all_multiprocessors_work(gpu: torch.device, columns: int) -> None:
    """A call takes tens of times what a copy does, if one block does the work of all."""
    x = torch.randn(-(-(1 << 26) // columns), columns, device=gpu)
    target = torch.zeros(len(x), dtype=torch.int64, device=gpu)
    copy = torch.empty_like(x)

    def milliseconds(run: Callable[[], Any]) -> float:
        samples = []
        for _ in range(4):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end))
        return min(samples)

    limit = 40 * milliseconds(lambda: copy.copy_(x))
    for dtype in (torch.float32, torch.bfloat16):
        y = x.to(dtype)
        for loss, other in (("cross_entropy", target), ("nll_loss", target), ("mse_loss", y)):
            call = partial(mbkern.loss_and_grad, loss, y, other, grad_out=y)
            assert milliseconds(call) < limit, (loss, dtype)


def test_an_accumulator_over_streams(gpu: torch.device) -> None:
    """Gradients of several streams wait for their launch, and end on one that is none of these:
    nobody reads them too early, or has their memory meanwhile."""
    x = torch.randn(64, 32, device=gpu)

    def window(streams: list[torch.cuda.Stream]) -> list[Tensor]:
        layers = [torch.nn.Linear(32, 32, device=gpu) for _ in streams]
        for k, layer in enumerate(layers):
            torch.nn.init.constant_(layer.weight, 0.01 * (k + 1))
            torch.nn.init.constant_(layer.bias, 0.1)
        acc = mbkern.GradAccumulator(torch.nn.ModuleList(layers))
        torch.cuda.synchronize(gpu)
        for k in range(4):
            parts = []
            for stream, layer in zip(streams, layers, strict=True):
                with torch.cuda.stream(stream):
                    torch.full((1 << 16,), float("nan"), device=gpu)  # takes memory that is free
                    parts.append(layer(x * (k + 1)).square().sum())
                    torch.cuda._sleep(5_000_000)
            for stream in streams:
                torch.cuda.current_stream(gpu).wait_stream(stream)
            torch.cuda._sleep(20_000_000)  # the launch comes late
            acc.backward(torch.stack(parts).sum(), count=64)
        acc.flush()
        torch.cuda.synchronize(gpu)
        return [p.grad.clone() for layer in layers for p in layer.parameters()]

    here = torch.cuda.current_stream(gpu)
    want = window([here, here])
    got = window([torch.cuda.Stream(gpu), torch.cuda.Stream(gpu)])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
