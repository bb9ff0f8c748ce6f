"""One rank of test_linear_parallel.py, its numbers: ``distributed_shards.py RANK WORLD FOLDER``."""

from __future__ import annotations

import process_group
import torch
import torch.distributed as dist
from distributed_disagreements import (
    check_disagreements,
    check_infinite_weight,
    check_soft_cap,
)
from distributed_shard_cases import FEATURES, cases, close, make, part, run
from distributed_shard_settings import (
    check_buffers,
    check_dtensors,
    check_refusals,
    check_settings,
)

from mbkern import functional as F


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
