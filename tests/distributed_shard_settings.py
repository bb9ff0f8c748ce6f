"""A part of distributed_shards.py: DTensors, autocast, groups, modules, buffers, and refusals."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from distributed_shard_cases import FEATURES, SIZES, close, make, part, refused, run
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mbkern.nn
from mbkern import functional as F


def check_dtensors(rank: int, world: int) -> None:
    """The weight cut over the mesh; the input replicated, cut along its rows, or its features."""
    mesh = dist.init_device_mesh("cpu", (world,))
    for shape, placement in (
        ((12,), Replicate()), ((12,), Shard(0)), ((2, 7), Shard(1)), ((12,), Shard(1)),
    ):  # fmt: skip
        tensors, options = make({"shape": shape, "bias": True, "weighted": True})
        want, _ = run(tensors, options)
        mine = {
            "input": distribute_tensor(tensors["input"], mesh, [placement]),
            "linear_weight": distribute_tensor(tensors["linear_weight"], mesh, [Shard(0)]),
            "linear_bias": distribute_tensor(tensors["linear_bias"], mesh, [Shard(0)]),
            "target": distribute_tensor(tensors["target"], mesh, [Replicate()]),
            "logit_scale": None,
        }
        found, _ = run(mine, options)
        for key, value in want.items():
            got = found[key]
            if isinstance(got, DTensor):
                assert got.placements == mine[key].placements
                got = got.full_tensor()
            close(f"DTensor {placement}, {key}", got, value, torch.float32)
        plain = mine | {"input": tensors["input"], "target": tensors["target"]}
        refused(TypeError, partial(run, plain, options), "pass a DTensor, or process_group=")
        found, _ = run(plain, options, process_group=mesh.get_group())
        close("plain input", found["input"], want["input"], torch.float32)
    tensors, options = make({})
    w = distribute_tensor(tensors["linear_weight"], mesh, [Shard(1)])
    x = distribute_tensor(tensors["input"], mesh, [Replicate()])
    refused(
        NotImplementedError, lambda: F.linear_cross_entropy(x, w, tensors["target"]), "Shard(0)"
    )
    buffer = distribute_tensor(torch.zeros(tensors["linear_weight"].shape), mesh, [Shard(0)])
    w = distribute_tensor(tensors["linear_weight"], mesh, [Shard(0)]).requires_grad_()
    F.linear_cross_entropy(x, w, tensors["target"], accumulate_into=buffer).backward()
    assert w.grad is None
    want, _ = run(tensors, options)
    generator = torch.Generator().manual_seed(6)
    incoming = torch.rand((), generator=generator)
    close("buffer", buffer.full_tensor() * incoming, want["linear_weight"], torch.float32)


def check_settings(rank: int, world: int) -> None:
    """Autocast, a default device, a subgroup, frozen tensors, copies, what collectives leave."""
    group = dist.group.WORLD
    tensors, _ = make({})
    x, w, target = tensors["input"], tensors["linear_weight"], tensors["target"]
    assert x is not None
    assert w is not None
    assert target is not None
    mine = part(w, rank, world)
    with torch.autocast("cpu", torch.bfloat16):
        want = F.linear_cross_entropy(x, w, target, label_smoothing=0.3)
        found = F.linear_cross_entropy(x, mine, target, label_smoothing=0.3, process_group=group)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=0)
    with torch.device("cpu"):
        F.linear_cross_entropy(x, mine, target, process_group=group)

    # The input requires grad on one rank only: no rank waits for another.
    leaf = x.clone().requires_grad_(rank == 0)
    F.linear_cross_entropy(leaf, mine, target, process_group=group).backward()
    want = x.clone().requires_grad_()
    F.linear_cross_entropy(want, w, target).backward()
    if rank == 0:
        close("frozen elsewhere", leaf.grad, want.grad, torch.float32)

    # The gradient of the log-sum-exp alone, with a filter.
    leaf = x.clone().requires_grad_()
    _, stats = F.linear_cross_entropy(
        leaf, mine, target, filter_eps=1e-5, return_stats=True, process_group=group
    )
    (stats.lse.sum() * 1e-6).backward()
    assert leaf.grad.abs().max() > 1e-8

    # Ranks of a group are not ranks of all.
    pairs = [list(range(k, world, max(1, world // 2))) for k in range(max(1, world // 2))]
    groups = [dist.new_group(ranks[::-1]) for ranks in pairs]
    for ranks, pair in zip(pairs, groups, strict=True):
        if rank not in ranks:
            continue
        own = dist.get_rank(pair)
        tall = torch.randn(2048, FEATURES, generator=torch.Generator().manual_seed(2))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        share = tall[own * 1024 : own * 1024 + 1024].clone().requires_grad_()
        F.linear_cross_entropy(leaves[0], tall, target, split_invariant=True).backward()
        F.linear_cross_entropy(
            leaves[1], share, target, split_invariant=True, process_group=pair
        ).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)

    head = mbkern.nn.LinearCrossEntropyLoss(FEATURES, SIZES[world][rank], process_group=group)
    other = copy.deepcopy(head)
    assert other.process_group is group
    refused(TypeError, lambda: pickle.dumps(head), "state_dict")
    pickle.dumps(mbkern.nn.LinearCrossEntropyLoss(FEATURES, 3))

    mesh = dist.init_device_mesh("cpu", (world,))
    weight = distribute_tensor(w, mesh, [Shard(0)])
    rows = distribute_tensor(x, mesh, [Shard(0)])
    moved = rows.redistribute(placements=[Replicate()], async_op=True)
    torch.testing.assert_close(
        F.linear_cross_entropy(moved, weight, target), F.linear_cross_entropy(x, w, target)
    )
    uneven = torch.zeros(30 if rank == 0 else 7 if rank == 1 else 0, FEATURES)
    odd = DTensor.from_local(
        uneven, mesh, [Shard(0)], run_check=False, shape=torch.Size((37, FEATURES)),
        stride=(FEATURES, 1),
    )  # fmt: skip
    plain = distribute_tensor(x, mesh, [Replicate()])
    if world == 2:
        refused(ValueError, lambda: F.linear_cross_entropy(plain, odd, target), "cut otherwise")
    if world == 4:
        grid = dist.init_device_mesh("cpu", (2, 2))
        square = distribute_tensor(w, grid, [Replicate(), Shard(0)])
        call = partial(F.linear_cross_entropy, x, square, target)
        refused(TypeError, partial(call, process_group=grid.get_group(1)), "several dimensions")
        refused(ValueError, partial(call, process_group=group), "process_group has")


def check_buffers(rank: int, world: int) -> None:
    """Two micro-batches into this rank's buffer; its module; nothing is kept of a forward alone."""
    tensors, options = make({"reduction": "sum", "bias": True})
    weight, bias = (
        part(tensors["linear_weight"], rank, world),
        part(tensors["linear_bias"], rank, world),
    )
    assert weight is not None
    assert bias is not None
    head = mbkern.nn.LinearCrossEntropyLoss(
        FEATURES, weight.shape[0], bias=True, process_group=dist.group.WORLD, **options
    )
    head.load_state_dict({"linear.weight": weight, "linear.bias": bias})
    buffer = torch.zeros_like(weight)
    head.accumulate_into = buffer
    x, target = tensors["input"], tensors["target"]
    assert x is not None
    assert target is not None
    head(x, target)
    assert not buffer.any()
    for rows in (slice(0, 4), slice(4, None)):
        head(x[rows], target[rows]).backward()
    assert head.linear.weight.grad is None
    leaf = tensors["linear_weight"]
    assert leaf is not None
    leaf = leaf.clone().requires_grad_()
    F.linear_cross_entropy(
        x, leaf, target, linear_bias=tensors["linear_bias"], **options
    ).backward()
    assert leaf.grad is not None
    want = part(leaf.grad, rank, world)
    assert want is not None
    close("buffer", buffer, want, torch.float32)


def check_refusals(rank: int, world: int) -> None:
    """Errors that name the values."""
    group = dist.group.WORLD
    tensors, _ = make({})
    x, w, target = tensors["input"], part(tensors["linear_weight"], rank, world), tensors["target"]
    assert x is not None
    assert w is not None
    assert target is not None

    def call(**changed: Any) -> Any:
        arguments = {"input": x, "linear_weight": w, "target": target, "process_group": group}
        return F.linear_cross_entropy(**(arguments | changed))

    refused(IndexError, lambda: call(target=torch.full_like(target, 37)), "[0, 37)")
    refused(ValueError, lambda: call(weight=torch.ones(30)), "37 classes")
    refused(ValueError, lambda: call(input=x[: 5 + rank]), "the target, which has 12")
    refused(NotImplementedError, lambda: call(target=torch.rand(12, 37)), "class indices")
    refused(ValueError, lambda: call(target=target.roll(rank)), "targets differ between ranks")
    refused(ValueError, lambda: call(return_stats=rank == 0), "return_stats differ")
    bias = torch.zeros(w.shape[0] + (rank == 1))
    refused(ValueError, lambda: call(linear_bias=bias), "linear_bias, of the shape")
    exact = partial(call, split_invariant=True)
    refused(ValueError, exact, "not a multiple of 1024")
    refused(NotImplementedError, partial(exact, label_smoothing=0.1), "label_smoothing")
    refused(NotImplementedError, partial(exact, weight=torch.ones(37)), "weight")
    refused(ValueError, lambda: call(accumulate_into=torch.zeros(3, 3)), "accumulate_into")
    refused(RuntimeError, lambda: torch.func.grad(lambda t: call(input=t))(x), "cannot be traced")
    leaf = x.clone().requires_grad_()
    loss = call(input=leaf)
    refused(
        RuntimeError, lambda: torch.autograd.grad(loss, leaf, create_graph=True), "create_graph"
    )
