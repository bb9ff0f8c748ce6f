"""One rank of test_accumulator_ranks.py: ``distributed_window.py RANK WORLD FOLDER KIND``."""

from __future__ import annotations

import sys
from typing import Any

import process_group
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mbkern

ROWS, STEPS = 24, 4


def new_model(unused: bool = True) -> torch.nn.Module:
    """Small; one of its parameters may take no part."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 7))
    if unused:
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    """The mini-batch of each step."""
    g = torch.Generator().manual_seed(8)
    return [
        (torch.randn(ROWS, 5, generator=g), torch.randint(7, (ROWS,), generator=g))
        for _ in range(STEPS)
    ]


def shares(rank: int, world: int) -> list[slice]:
    """A rank's micro-batches: uneven, the last rank of four has none."""
    cut = {1: [0, ROWS], 2: [0, 5, ROWS], 4: [0, 1, 14, ROWS, ROWS]}[world]
    first, end = cut[rank], cut[rank + 1]
    ends = list(range(first, end, 4))
    return [slice(a, min(a + 4, end)) for a in ends]


def train(
    model: Any,
    accumulator: mbkern.GradAccumulator,
    rank: int,
    world: int,
    mode: str,
    sharded: str = "",
) -> list[Tensor]:
    """The weights after all steps, and the last gradient norm.

    ``sharded``: every rank runs as many micro-batches; FSDP reduces each of them, or "late": the
    last one only, "kept": none, "mixed": the first.
    """
    parameters = [p for name, p in model.named_parameters() if not name.endswith("unused")]
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    stats = None
    for x, target in batches():
        if mode == "known":
            accumulator.begin(total=ROWS)
        parts = shares(rank, world)
        if sharded:
            most = max(len(shares(r, world)) for r in range(world))
            parts += [slice(0, 0)] * (most - len(parts))
        for k, part in enumerate(parts):
            if sharded == "late":
                model.set_requires_gradient_sync(k == len(parts) - 1)
            elif sharded in ("kept", "mixed"):
                model.set_requires_gradient_sync(sharded == "mixed" and k == 0)
            loss = F.cross_entropy(model(x[part]), target[part], reduction="sum")
            accumulator.backward(loss, count=part.stop - part.start)
        stats = accumulator.flush()
        optimiser.step()
    assert stats is not None
    return [*(whole(p).clone() for p in parameters), stats.norm]


def whole(parameter: Any) -> Tensor:
    """All of a parameter."""
    found: Tensor = parameter.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def with_error(accumulator: mbkern.GradAccumulator, model: Any, mode: str) -> None:
    """A micro-batch that fails after its backward."""
    if mode == "known":
        accumulator.begin(total=1)
    with accumulator.micro_batch(count=1):
        model(torch.ones(1, 5)).sum().backward()
        raise KeyError


def fsdp(kind: str, model: Any, rank: int, world: int) -> list[Tensor]:
    """By FSDP2, or HSDP over 2 x 2 ranks."""
    shape = (2, world // 2) if kind.startswith("hsdp") else (world,)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="fully_shard has wrapped"):
        mbkern.GradAccumulator(list(model.parameters()))
    with pytest.raises(NotImplementedError, match="measure=True"):
        mbkern.GradAccumulator(model, measure=True)
    mode = "known" if "known" in kind else "deferred"
    layout = "parameter" if "known" in kind else "flat"
    accumulator = mbkern.GradAccumulator(model, max_norm=0.5, mode=mode, layout=layout)
    with pytest.raises(NotImplementedError, match="is sharded"):
        accumulator.buffer(next(model.parameters()))
    if "late" in kind or "kept" in kind:
        model.set_requires_gradient_sync(False)
        if mode == "known":
            accumulator.begin(total=1)
        accumulator.backward(model(torch.ones(1, 5)).sum(), count=1)
        accumulator.reset()  # nothing of it may be left
        two = mbkern.GradAccumulator(model, denominators=("a", "b"))
        with pytest.raises(RuntimeError, match="other denominators"):
            two.backward(model(torch.ones(1, 5)).sum(), count=1, denominator="a")
        with pytest.raises(RuntimeError, match="reset"):  # it cannot be told apart any more
            two.flush()
        two.reset()
        two.close()
        first = next(s.parameter for s in accumulator._members.slots if s.name == "0.weight")
        with pytest.raises(KeyError):
            with_error(accumulator, model, mode)
        with pytest.raises(RuntimeError, match="micro-batch 0 failed"):
            accumulator.flush()
        accumulator.reset()
        model(torch.ones(1, 5)).sum().backward()
        for call in (accumulator.flush, lambda: with_error(accumulator, model, mode)):
            with pytest.raises(RuntimeError, match="outside the micro-batches"):
                call()
        accumulator.reset()
        if mode == "deferred":  # frozen in mid-window: what it had is in the window
            accumulator.backward(model(torch.ones(1, 5)).sum(), count=1)
            first.requires_grad_(False)
            accumulator.flush()
            assert first.grad is not None
            first.requires_grad_()
            model.zero_grad()
        if kind.startswith("hsdp"):
            model.set_requires_gradient_sync(True)
            model.set_requires_all_reduce(False)
            accumulator.backward(model(torch.ones(1, 5)).sum(), count=1)
            with pytest.raises(RuntimeError, match="not added up over replicas"):
                accumulator.flush()
            accumulator.reset()
            model.set_requires_all_reduce(True)
            model.set_requires_gradient_sync(False)
    sharded = next((word for word in ("late", "kept", "mixed") if word in kind), "each")
    result = train(model, accumulator, rank, world, mode, sharded)
    # A penalty, without clipping; the state in mid-window.
    model.set_requires_gradient_sync(sharded != "kept")
    accumulator.close()
    model.zero_grad()
    plain = mbkern.GradAccumulator(model, l2=0.1, l1=0.01)
    x, target = batches()[0]
    for k, part in enumerate((slice(rank, rank + 1), slice(8 + rank, 9 + rank))):
        loss = F.cross_entropy(model(x[part]), target[part], reduction="sum")
        plain.backward(loss, count=1)
        if k == 0:
            plain.load_state_dict(plain.state_dict())
    stats = plain.flush()
    grads = [whole(p.grad) for n, p in model.named_parameters() if not n.endswith("unused")]
    return [*result, *grads, stats.norm, stats.penalty]


def fsdp_alone(model: Any, world: int) -> list[Tensor]:
    """The end of ``fsdp``, by one process with all the items."""
    model.zero_grad()
    plain = mbkern.GradAccumulator(model, l2=0.1, l1=0.01)
    x, target = batches()[0]
    rows = torch.cat((torch.arange(world), torch.arange(8, 8 + world)))
    loss = F.cross_entropy(model(x[rows]), target[rows], reduction="sum")
    plain.backward(loss, count=len(rows))
    stats = plain.flush()
    return [
        *(p.grad for n, p in model.named_parameters() if not n.endswith("unused")),
        stats.norm, stats.penalty,
    ]  # fmt: skip


def main() -> None:
    """Train, and write the result of this rank."""
    rank, world, folder, (kind,) = process_group.join(8 if "dead" in sys.argv else 60)
    model: Any = new_model(unused=kind != "ddp" and "kept" not in kind)
    if kind == "dead" and rank == 1:
        return  # without a word to the others
    mode = "known" if kind == "known" else "deferred"
    if kind.startswith(("fsdp", "hsdp")):
        result = fsdp(kind, model, rank, world)
    elif kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.warns(UserWarning, match="stay this rank's"):
            mbkern.GradAccumulator(list(model.parameters())).close()
        accumulator = mbkern.GradAccumulator(
            torch.compile(torch.nn.Sequential(model)), max_norm=0.5
        )
        with pytest.raises(ValueError, match="given to the constructor"):
            mbkern.GradAccumulator([], process_group=False).add(model)
        with pytest.raises(RuntimeError, match="no_sync"):
            accumulator.backward(torch.ones((), requires_grad=True), count=1)
        model.zero_grad()
        with model.no_sync():
            result = train(model, accumulator, rank, world, mode)
    else:
        layout = "parameter" if kind == "parameter" else "flat"
        accumulator = mbkern.GradAccumulator(
            model, max_norm=0.5, mode=mode, layout=layout, process_group=dist.group.WORLD
        )
        result = train(model, accumulator, rank, world, mode)
    torch.save(result, folder / f"out.{rank}")
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
