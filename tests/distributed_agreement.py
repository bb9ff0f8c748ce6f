"""One rank of test_accumulator_agreement.py: ``distributed_agreement.py RANK WORLD FOLDER``.

Ranks that have seen different things of a window, or of which one fails, end it alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import process_group
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mbkern

REFUSED = "refused on another rank"


def new_model() -> torch.nn.Sequential:
    """Three layers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 5), torch.nn.Linear(5, 2)
    )


def new_accumulator(model: Any, **options: Any) -> mbkern.GradAccumulator:
    """Of the whole group."""
    return mbkern.GradAccumulator(model, process_group=dist.group.WORLD, **options)


def run(accumulator: mbkern.GradAccumulator, model: Any, items: int = 2) -> None:
    """One micro-batch."""
    accumulator.backward(model(torch.ones(items, 3)).sum(), count=items)


def require_same(model: Any, norm: Tensor) -> list[Tensor | None]:
    """The gradients, of the same bits on every rank."""
    grads = [p.grad for p in model.parameters()]
    mine = torch.cat([g.reshape(-1).double() for g in grads if g is not None] + [norm.reshape(1)])
    size = torch.tensor([len(mine), -len(mine)])
    dist.all_reduce(size, dist.ReduceOp.MAX)
    assert int(size[0]) == -int(size[1]), "a parameter has a gradient on some ranks only"
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    assert all(torch.equal(other, mine) for other in found)
    return grads


def refused(rank: int, call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    """On rank 0 what it says; on the others that it did."""
    with pytest.raises(RuntimeError if rank else kind, match=REFUSED if rank else text):
        call()


def thawed_at_different_times(rank: int) -> None:
    """One by one where a micro-batch runs between, or a kernel asks for a buffer; else in flush."""
    for lend in (False, True):
        model, alone = new_model(), new_model()
        model[0].requires_grad_(False)
        accumulator = new_accumulator(model)
        for parameter in (model[0].bias, model[0].weight):
            parameter.requires_grad_()
            if rank == 0 and lend:
                accumulator.buffer(parameter)
            elif rank == 0:
                run(accumulator, model)
        run(accumulator, model)
        grads = require_same(model, accumulator.flush().norm)
        alone(torch.ones(2, 3)).sum().backward()
        want = alone[0].bias.grad
        assert want is not None
        assert grads[1] is not None
        torch.testing.assert_close(grads[1], want / 2)


def frozen_in_the_window(rank: int) -> None:
    """What some ranks have of a parameter is in the window of all, even if others never had it."""
    model = new_model()
    model[2].weight.requires_grad_(False)
    accumulator = new_accumulator(model, max_norm=0.1)
    model[2].weight.requires_grad_()
    if rank == 0:
        run(accumulator, model)
    model[2].weight.requires_grad_(False)
    model[0].weight.requires_grad_(False)
    grads = require_same(model, accumulator.flush().norm)
    assert all(g is not None and g.any() for g in grads)
    run(accumulator, model)  # what had nothing in the next one has no gradient
    grads = require_same(model, accumulator.flush().norm)
    assert [g is None for g in grads] == [True, False, True, False, False, False]


def all_frozen(rank: int) -> None:
    """Items count, with nothing to train."""
    model = new_model().requires_grad_(False)
    accumulator = new_accumulator(model)
    accumulator.backward(torch.zeros((), requires_grad=True), count=1 + rank)
    assert float(accumulator.flush().counts[""]) == sum(range(1, dist.get_world_size() + 1))


def fail_behind_a_kernel(accumulator: mbkern.GradAccumulator, model: Any) -> None:
    """A micro-batch that fails when some of its gradients have been added."""
    with accumulator.micro_batch(count=2):
        accumulator.buffer(model[0].bias).add_(1)
        model[0].weight.grad = torch.ones(4, 3)


def one_rank_fails(rank: int) -> None:
    """Nobody waits, nothing is lost: once the rank has decided, the window ends."""
    model = new_model()
    accumulator = new_accumulator(model)
    run(accumulator, model)
    if rank == 0:
        with pytest.raises(RuntimeError, match="no hook saw"):
            fail_behind_a_kernel(accumulator, model)
    for _ in range(2):
        refused(rank, accumulator.flush, RuntimeError, "micro-batch 1 failed")
    if rank == 0:
        accumulator.keep_partial()
    stats = accumulator.flush()
    assert float(stats.counts[""]) == 2 * dist.get_world_size() + 2
    require_same(model, stats.norm)
    # A scaler's optimizer lacks a parameter that only this rank has a gradient of.
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model[:3].parameters(), lr=0.1)
    if rank == 0:
        accumulator.backward(scaler.scale(model(torch.ones(2, 3)).sum()), count=2)
    refused(
        rank, lambda: accumulator.flush(scaler, optimizer), ValueError, "none of the optimizers"
    )


def data_parallel(rank: int) -> None:
    """Another group is not passed over; buffers of a module are shared without a forward."""
    norm = torch.nn.BatchNorm1d(4, affine=False)
    norm.running_mean.fill_(float(rank))  # type: ignore[union-attr]
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 4), norm))
    for other in (dist.new_group(), False):
        with pytest.raises(ValueError, match="brings its own process group"):
            mbkern.GradAccumulator(model, process_group=other)
    assert mbkern.GradAccumulator(model, process_group=model.process_group)._group is not None
    accumulator = mbkern.GradAccumulator(model)
    for _ in range(2):
        with model.no_sync():
            for k in range(2 if rank == 0 else 0):
                accumulator.backward((model(torch.randn(4, 3)) * (k + 1)).sum(), count=4)
        require_same(model, accumulator.flush().norm)


def states(rank: int, world: int) -> None:
    """A window goes on with each rank's own sums; those of another would be counted twice."""
    model = new_model()
    accumulator = new_accumulator(model)
    empty = accumulator.state_dict()
    run(accumulator, model, 1 + rank)
    saved: list[Any] = [None] * world
    dist.all_gather_object(saved, accumulator.state_dict())
    want = accumulator.flush().norm
    with pytest.raises(ValueError, match=f"rank {1 - min(rank, 1)} of {world} in mid-window"):
        accumulator.load_state_dict(saved[1 - min(rank, 1)])
    accumulator.load_state_dict(empty)
    accumulator.load_state_dict(saved[rank])
    assert torch.equal(accumulator.flush().norm, want)
    alone = mbkern.GradAccumulator(new_model(), process_group=False)
    with pytest.raises(ValueError, match=f"of {world} in mid-window, and this is rank 0 of 1"):
        alone.load_state_dict(saved[0])
    alone.load_state_dict(empty)
    run(alone, model)
    one = alone.state_dict()
    one["micro_batches"] = 1
    if rank == 0:  # of fewer ranks: the others begin without
        accumulator.load_state_dict(one)
    else:
        with pytest.raises(ValueError, match="rank 0 of 1"):
            accumulator.load_state_dict(one)


def shards(rank: int, world: int) -> None:
    """A broken window of one rank; an overflow that only one shard has once it is clipped."""
    mesh = dist.init_device_mesh("cpu", (world,))
    layer: Any = torch.nn.Linear(1, 2 * world, bias=False, dtype=torch.float16)
    fully_shard(layer, mesh=mesh)
    accumulator = mbkern.GradAccumulator(layer, max_norm=1e6, pre_scale=2.0**-7)
    rows = torch.arange(2 * world) == 2 * world - 1
    loss = (layer(torch.ones(1, 1, dtype=torch.float16)) * rows).float().sum() * 70000.0
    accumulator.backward(loss, count=1)
    if rank == 0:
        accumulator._window.broken = "it failed"
    refused(rank, accumulator.flush, RuntimeError, "it failed")
    accumulator._window.broken = None
    assert accumulator.flush().found_inf == 1


def random_windows(rank: int, world: int, rounds: int) -> None:
    """Sums of products with constants, whose gradients are those, beside a model in float64."""
    for seed in range(rounds):
        choose = random.Random(seed)
        shapes = [choose.choice([(3,), (), (0,), (4, 5), (2, 3, 4)]) for _ in range(4)]
        parameters = [
            torch.nn.Parameter(torch.randn(s), requires_grad=choose.random() < 0.7) for s in shapes
        ]
        names = choose.choice([("",), ("a", "b")])
        known = choose.random() < 0.3
        accumulator = new_accumulator(
            parameters, mode="known" if known else "deferred", l2=0.25,
            denominators=names if len(names) > 1 else (),
            layout=choose.choice(["flat", "parameter"]),
            dtype=choose.choice([torch.float32, torch.float64]),
        )  # fmt: skip
        for p in parameters:
            with torch.no_grad():
                p.fill_(0.5)
        for _ in range(3):
            sums = {name: [torch.zeros(s, dtype=torch.float64) for s in shapes] for name in names}
            counts = dict.fromkeys(names, 0)
            had = [False] * len(parameters)
            program = [(r, choose.choice(names)) for r in range(world) for _ in range(3)]
            program = [step for step in program if choose.random() < 0.6]
            if known:
                totals = {name: 1 + sum(n == name for _, n in program) for name in names}
                accumulator.begin(totals if len(names) > 1 else totals[""])
            done: dict[int, list[int]] = {r: [] for r in range(world)}
            for k, (r, _) in enumerate(program):
                done[r].append(k)
            for step in range(3):  # the ranks' micro-batches side by side; then what is frozen
                for r in range(world):
                    if step >= len(done[r]):
                        continue
                    name = program[done[r][step]][1]
                    taken = [choose.random() < 0.6 and p.requires_grad for p in parameters]
                    value = choose.randint(1, 8)
                    counts[name] += 1
                    for i, take in enumerate(taken):
                        sums[name][i] += value if take else 0
                        had[i] |= take
                    if r == rank:
                        loss = torch.zeros((), requires_grad=True) * 1.0
                        for p, take in zip(parameters, taken, strict=True):
                            loss = loss + (p.sum() * value if take else 0.0)
                        accumulator.backward(loss, count=1, denominator=name)
                for p in parameters:
                    if choose.random() < 0.15:
                        p.requires_grad_(not p.requires_grad)
            stats = accumulator.flush()
            divisors = totals if known else counts
            for i, p in enumerate(parameters):
                if p.grad is None:
                    assert not p.requires_grad
                    assert not had[i]
                    continue
                mean = sum(sums[n][i] / max(divisors[n], 1) for n in names)
                torch.testing.assert_close(p.grad.double(), mean + 0.25 * 0.5, rtol=1e-6, atol=1e-6)
            if not known:
                assert {name: float(n) for name, n in stats.counts.items()} == counts


def main() -> None:
    """Run every check."""
    rank, world, _, arguments = process_group.join(30)
    thawed_at_different_times(rank)
    frozen_in_the_window(rank)
    all_frozen(rank)
    one_rank_fails(rank)
    data_parallel(rank)
    states(rank, world)
    random_windows(rank, world, int(arguments[0]))
    if "shards" in arguments:
        shards(rank, world)
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
