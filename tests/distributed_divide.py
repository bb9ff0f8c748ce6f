"""One rank of test_accumulator_divide.py: ``distributed_divide.py RANK WORLD FOLDER``."""

from __future__ import annotations

from typing import Any

import process_group
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_window import batches, new_model, shares, whole
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import mbkern

FACTORS = (1.0, 3.0)
WAYS = ("each", "kept", "known")  # every micro-batch reduced, none, and totals known before


def window(accumulator: mbkern.GradAccumulator, model: Any, parts: list[slice]) -> list[Tensor]:
    """The gradients and their norm."""
    x, target = batches()[0]
    if accumulator.mode == "known":
        accumulator.begin(total=len(x))
    for part in parts:
        loss = F.cross_entropy(model(x[part]), target[part], reduction="sum")
        accumulator.backward(loss, count=part.stop - part.start)
    norm = accumulator.flush().norm
    return [*(whole(p.grad) for p in model.parameters()), norm]


def sharded(factor: float, world: int) -> Any:
    """By FSDP2, or by HSDP over 2 x 2 ranks; dividing by a factor."""
    shape = (2, 2) if world == 4 else (world,)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model: Any = new_model(unused=False)
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(factor)  # of this module's own parameters only
        module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    return model


def divided(factor: float, way: str, rank: int, world: int) -> list[Tensor]:
    """A window of a module that divides by a factor."""
    model = sharded(factor, world)
    model.set_requires_gradient_sync(way != "kept")
    mode = "known" if way == "known" else "deferred"
    parts = shares(rank, world)
    most = max(len(shares(r, world)) for r in range(world))
    parts += [slice(0, 0)] * (most - len(parts))
    return window(mbkern.GradAccumulator(model, mode=mode), model, parts)


def refuse_two_factors(world: int) -> None:
    """One sum cannot undo both."""
    model = sharded(3.0, world)
    model[0].set_gradient_divide_factor(2.0)
    accumulator = mbkern.GradAccumulator(model)
    with pytest.raises(ValueError, match=r"different factors: \[2.0, 3.0\]"):
        window(accumulator, model, [slice(0, 1)])


def refuse_another_factor(world: int) -> None:
    """Nor one that changes in a window; with the old one it goes on."""
    model = sharded(3.0, world)
    accumulator = mbkern.GradAccumulator(model)
    x, target = batches()[0]

    def backward() -> None:
        loss = F.cross_entropy(model(x[:1]), target[:1], reduction="sum")
        accumulator.backward(loss, count=1)

    backward()
    for module in (model[0], model):
        module.set_gradient_divide_factor(1.0)
    for call in (backward, accumulator.flush):
        with pytest.raises(RuntimeError, match="by 1 now, and divided by 3"):
            call()
    for module in (model[0], model):
        module.set_gradient_divide_factor(3.0)
    assert accumulator.flush().counts == {"": float(world)}


def main() -> None:
    """Every factor in every way, and write the results of this rank."""
    rank, world, folder, _ = process_group.join()
    found = {
        f"{factor:g} {way}": divided(factor, way, rank, world) for factor in FACTORS for way in WAYS
    }
    refuse_two_factors(world)
    refuse_another_factor(world)
    torch.save(found, folder / f"out.{rank}")
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
