"""One rank of test_linear_parallel.py: ``distributed_shards.py RANK WORLD FOLDER``."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import process_group
import pytest
import torch
import torch.distributed as dist
from distributed_disagreements import (
    check_disagreements,
    check_infinite_weight,
    check_soft_cap,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mbkern.nn
from mbkern import functional as F

FEATURES = 8
SIZES = {2: (30, 7), 4: (3, 16, 0, 18)}  # of the ranks' classes: uneven, one empty
Case = dict[str, Any]


def cases() -> Iterator[tuple[str, Case]]:
    """Names, and the options of each call."""
    yield "mean", {}
    yield "sum", {"reduction": "sum"}
    yield "none", {"reduction": "none"}
    yield "bias", {"bias": True}
    yield "float64", {"dtype": torch.float64, "bias": True, "label_smoothing": 0.1}
    yield "bfloat16", {"dtype": torch.bfloat16, "bias": True}
    yield "float16", {"dtype": torch.float16}
    yield "smoothing", {"label_smoothing": 0.2}
    yield "class weights", {"weighted": True}
    yield "class weights, smoothing", {"weighted": True, "label_smoothing": 0.3, "bias": True}
    yield "z-loss", {"z_loss": 0.02, "weighted": True, "label_smoothing": 0.1}
    yield "soft cap", {"softcap": 2.0}
    yield "soft cap, everything", {
        "softcap": 3.0, "weighted": True, "label_smoothing": 0.1, "z_loss": 0.01, "bias": True,
        "sampled": True, "reduction": "none",
    }  # fmt: skip
    yield "scale", {"logit_scale": 0.7, "bias": True}
    yield "learnt scale", {"scale": True, "bias": True}
    yield "sample weights", {"sampled": True}
    yield "denominator", {"denominator": 3.5}
    yield "chunks", {"chunk_bytes": 500}
    yield "three dimensions, shift", {"shape": (2, 6), "shift": 1}
    yield "inner dimensions", {"shape": (6,), "inner": (3,), "chunk_bytes": 300}
    yield "one item", {"shape": ()}
    yield "no item", {"shape": (0,), "reduction": "sum"}
    yield "no item, none", {"shape": (0,), "reduction": "none"}
    yield "all ignored", {"ignored": True, "reduction": "sum"}
    yield "all ignored, none", {"ignored": True, "reduction": "none"}
    yield "filter", {"filter_eps": 1e-9, "logit_scale": 1e-3, "chunk_bytes": 500}
    yield "certain", {"gain": 60.0}
    yield "an ignored class", {"ignore_index": 4}


def make(case: Case) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The tensors and the options of a call in one process, the same on every rank."""
    g = torch.Generator().manual_seed(5)
    options = dict(case)
    dtype = options.pop("dtype", torch.float32)
    shape, inner = options.pop("shape", (12,)), options.pop("inner", ())
    gain = options.pop("gain", 1.0)
    classes = sum(SIZES[2])
    x = torch.randn(*shape, FEATURES, generator=g)
    w = torch.randn(classes, *inner, FEATURES, generator=g) * gain
    target = torch.randint(classes, (*shape, *inner), generator=g)
    if target.numel() > 2:
        target.view(-1)[1] = options.get("ignore_index", -100)
    if options.pop("ignored", False):
        target.fill_(-100)
    tensors: dict[str, Tensor | None] = {
        "input": x.to(dtype), "linear_weight": w.to(dtype), "linear_bias": None,
        "logit_scale": None, "target": target,
    }  # fmt: skip
    if options.pop("bias", False):
        tensors["linear_bias"] = torch.randn(classes, *inner, generator=g).to(dtype)
    if options.pop("scale", False):
        tensors["logit_scale"] = torch.tensor(1.3, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if options.pop("weighted", False):
        options["weight"] = torch.rand(classes, generator=g).to(wide)
    if options.pop("sampled", False):
        options["sample_weight"] = torch.rand(target.shape, generator=g).to(wide)
    return tensors, options


def run(
    tensors: dict[str, Tensor | None], options: dict[str, Any], **more: Any
) -> tuple[dict[str, Tensor], Any]:
    """Loss and gradients by name; and the statistics, if there are."""
    leaves: dict[str, Any] = {
        name: t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
        for name, t in tensors.items()
    }
    arguments = {name: t for name, t in leaves.items() if t is not None}
    result = F.linear_cross_entropy(**arguments, **options, **more)
    loss, stats = result if isinstance(result, tuple) else (result, None)
    generator = torch.Generator().manual_seed(6)
    incoming = torch.rand(loss.shape, generator=generator).to(loss.dtype)
    if options.get("split_invariant") or more.get("split_invariant"):
        # One process forms the gradients in forward, and multiplies them again, and rounds.
        incoming = torch.ones_like(loss) if loss.dim() == 0 else incoming
    value = (loss * incoming).sum()
    if stats is not None:
        value = value + (stats.lse.float() ** 2).sum() * 0.1
    value.backward()
    found = {name: t.grad for name, t in leaves.items() if t is not None and t.requires_grad}
    return {"loss": loss.detach(), **found}, stats


def part(tensor: Tensor | None, rank: int, world: int) -> Tensor | None:
    """A rank's classes."""
    if tensor is None:
        return None
    first = sum(SIZES[world][:rank])
    return tensor[first : first + SIZES[world][rank]].clone()


def close(name: str, found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Two results of one sum in another order."""
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2,
                 torch.float16: 2e-3}[dtype]  # fmt: skip
    scale = float(want.detach().abs().nan_to_num().max()) if want.numel() else 0.0
    torch.testing.assert_close(
        found,
        want,
        rtol=tolerance,
        atol=tolerance * max(scale, 1e-3),
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def check_cases(rank: int, world: int) -> None:
    """Each case against one process."""
    for name, case in cases():
        for with_stats in (False, True):
            tensors, options = make(case)
            want, all_stats = run(tensors, options, return_stats=with_stats)
            mine = dict(tensors)
            for key in ("linear_weight", "linear_bias"):
                mine[key] = part(tensors[key], rank, world)
                if tensors[key] is not None:
                    grad = part(want[key], rank, world)
                    assert grad is not None
                    want[key] = grad
            found, stats = run(
                mine, options, return_stats=with_stats, process_group=dist.group.WORLD
            )
            dtype = case.get("dtype", torch.float32)
            assert found.keys() == want.keys()
            for key, value in want.items():
                close(f"{name}, {key}", found[key], value, dtype)
                assert found[key].dtype is value.dtype
            if stats is None:
                continue
            for field, a, b in zip(stats._fields, stats, all_stats, strict=True):
                if field in ("items", "predictions"):
                    assert torch.equal(a, b), (name, field, a, b)
                else:
                    wide = torch.float64 if dtype is torch.float64 else torch.float32
                    loose = dtype in (torch.bfloat16, torch.float16)
                    close(f"{name}, {field}", a.to(b.dtype), b, dtype if loose else wide)


def check_special_values(rank: int, world: int) -> None:
    """NaN and infinite logits: NaN in their row, and in no other."""
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors, options = make({"reduction": "none"})
        x = tensors["input"]
        assert x is not None
        x[3, 0] = value
        want, _ = run(tensors, options)
        mine = tensors | {"linear_weight": part(tensors["linear_weight"], rank, world)}
        found, _ = run(mine, options, process_group=dist.group.WORLD)
        for key in ("loss", "input"):
            torch.testing.assert_close(found[key], want[key], rtol=1e-5, atol=1e-5, equal_nan=True)


def check_sequence_parallel(rank: int, world: int) -> None:
    """Each rank has some of the rows, unevenly, one none of them."""
    cut = {2: (5, 7), 4: (0, 1, 4, 7)}[world]
    for case in ({}, {"scale": True, "bias": True}, {"dtype": torch.bfloat16}):
        tensors, options = make(case)
        want, _ = run(tensors, options)
        rows = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
        x = tensors["input"]
        assert x is not None
        mine = {
            name: part(t, rank, world) if name.startswith("linear") else t
            for name, t in tensors.items()
        } | {"input": x[rows].clone()}
        found, _ = run(mine, options, process_group=dist.group.WORLD)
        dtype = case.get("dtype", torch.float32)
        close("loss", found["loss"], want["loss"], dtype)
        close("input", found["input"], want["input"][rows], dtype)
        grad = part(want["linear_weight"], rank, world)
        assert grad is not None
        close("weight", found["linear_weight"], grad, dtype)
        if "logit_scale" in want:
            close("scale", found["logit_scale"], want["logit_scale"], dtype)


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


BLOCKS = {2: (2048, 1030), 4: (1024, 1024, 0, 1030)}  # classes that begin at a block of 1024


def check_bits(rank: int, world: int) -> None:
    """Split-invariant: the bits of one process, whatever the threads."""
    classes = sum(BLOCKS[world])
    begin = sum(BLOCKS[world][:rank])
    mine = slice(begin, begin + BLOCKS[world][rank])
    g = torch.Generator().manual_seed(9)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in (
            {}, {"reduction": "none"}, {"softcap": 4.0, "z_loss": 1e-3, "logit_scale": 1.7},
            {"inner": True}, {"reduction": "sum", "shift": 1, "chunk_bytes": 50_000},
        ):  # fmt: skip
            more = dict(options)
            inner = (2,) if more.pop("inner", False) else ()
            x = torch.randn(3, 7, FEATURES, generator=g).to(dtype)
            w = torch.randn(classes, *inner, FEATURES, generator=g).to(dtype)
            bias = torch.randn(classes, *inner, generator=g).to(dtype)
            target = torch.randint(classes, (3, 7, *inner), generator=g)
            target[1, 3] = -100
            x[0, 1] *= 30  # nearly certain, right or wrong
            tensors = {
                "input": x, "linear_weight": w, "linear_bias": bias, "target": target,
                "logit_scale": None,
            }  # fmt: skip
            more["sample_weight"] = torch.rand(target.shape, generator=g).to(
                torch.float64 if dtype is torch.float64 else torch.float32
            )
            if "shift" in more:
                more["sample_weight"] = more["sample_weight"][:, 1:]
            want, _ = run(tensors, more, split_invariant=True)
            tensors |= {"linear_weight": w[mine].clone(), "linear_bias": bias[mine].clone()}
            torch.set_num_threads(1 + rank % 2)
            found, _ = run(tensors, more, split_invariant=True, process_group=dist.group.WORLD)
            torch.set_num_threads(1)
            for key, value in want.items():
                part_of = value[mine] if key.startswith("linear") else value
                if key == "loss" and dtype is torch.float64:  # added up in another order
                    torch.testing.assert_close(found[key], part_of)
                else:
                    assert torch.equal(found[key], part_of), (dtype, options, key)


def check_certain(rank: int, world: int) -> None:
    """The loss of a target that is nearly certain has its own precision."""
    for gap in (10.0, 30.0, 36.0, 40.0, 60.0):
        x = torch.zeros(1, FEATURES, dtype=torch.float64)
        x[0, 0] = gap
        w = torch.zeros(37, FEATURES, dtype=torch.float64)
        w[3, 0] = 1
        target = torch.tensor([3])
        want = F.linear_cross_entropy(x, w, target)
        mine = part(w, rank, world)
        found = F.linear_cross_entropy(x, mine, target, process_group=dist.group.WORLD)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


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


def refused(kind: type[Exception], call: Callable[[], Any], text: str) -> None:
    """What must be an error, on every rank."""
    with pytest.raises(kind, match=re.escape(text)):
        call()


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


def main() -> None:
    """Run every check."""
    rank, world, _, _ = process_group.join()
    check_cases(rank, world)
    check_special_values(rank, world)
    check_sequence_parallel(rank, world)
    check_dtensors(rank, world)
    check_certain(rank, world)
    check_settings(rank, world)
    check_bits(rank, world)
    check_buffers(rank, world)
    check_refusals(rank, world)
    check_disagreements(rank)
    check_soft_cap(rank)
    check_infinite_weight()
    process_group.leave()


if __name__ == "__main__":
    main()
