"""A part of distributed_shards.py: ranks that disagree, or of which one refuses, all raise; numbers
near the ends of their range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mbkern import functional as F

FEATURES, CLASSES, ROWS = 4, 5, 6  # classes of each rank


def arguments() -> dict[str, Any]:
    """Of a call that all ranks agree on, but for what each case changes."""
    g = torch.Generator().manual_seed(4)
    return {
        "input": torch.randn(ROWS, FEATURES, generator=g),
        "linear_weight": torch.randn(CLASSES, FEATURES, generator=g).requires_grad_(),
        "target": torch.arange(ROWS) % CLASSES,
        "process_group": dist.group.WORLD,
    }


def cases(first: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What differs on the first rank, and how the error begins there and elsewhere."""
    weight = arguments()["linear_weight"].detach()
    other = "another rank has refused"
    yield "dtypes of linear_weight differ", {"linear_weight": weight.double() if first else weight}
    yield "shapes of linear_weight, but", {"linear_weight": weight[:, first:]}
    yield "shapes or kinds of the target", {"target": torch.rand(ROWS)} if first else {}
    yield "linear_bias, of", {"linear_bias": torch.zeros(CLASSES).long() if first else None}
    yield "kinds of logit_scale", {"logit_scale": 2.0 if first else torch.tensor(2.0)}
    yield "must be a tensor" if first else other, {"linear_weight": None} if first else {}
    yield "must be a tensor" if first else other, {"input": None} if first else {}
    yield (
        "accumulate_into must be" if first else other,
        {"accumulate_into": torch.zeros(CLASSES, FEATURES + first)},
    )
    yield (
        "has the attribute" if first else other,
        {"accumulate_into": "main_grad" if first else torch.zeros(CLASSES, FEATURES)},
    )
    for name, here, elsewhere in (
        ("reduction", "none", "sum"), ("softcap", 2.0, 3.0), ("ignore_index", 1, 2),
        ("label_smoothing", 0.1, 0.0), ("split_invariant", True, False),
        ("loss_dtype", None, torch.float64),
        ("sample_weight", torch.ones(ROWS), None), ("denominator", 3, torch.tensor(3)),
    ):  # fmt: skip
        yield "options differ", {name: here if first else elsewhere}
    # Harmless alone: others' gradients would go nowhere, or be waited for.
    leaf = arguments()["input"].requires_grad_(not first)
    yield "nothing would be added", {
        "input": leaf, "accumulate_into": torch.zeros(CLASSES, FEATURES),
        "linear_weight": weight.clone().requires_grad_(not first),
    }  # fmt: skip


def check_disagreements(rank: int) -> None:
    """Errors at once, on every rank."""
    for text, changed in cases(rank == 0):
        with pytest.raises((TypeError, ValueError), match=text):
            F.linear_cross_entropy(**(arguments() | changed))
    given = arguments()
    given["input"].requires_grad_()
    with torch.set_grad_enabled(rank != 0), pytest.raises(ValueError, match="on some ranks"):
        F.linear_cross_entropy(**given)
    # What need not be the same.
    weight = arguments()["linear_weight"].detach()
    F.linear_cross_entropy(
        **arguments() | {"chunk_bytes": 50 + rank, "shift": False if rank else 0}
    )
    scale = torch.tensor(1.5, requires_grad=rank == 0)
    F.linear_cross_entropy(**arguments() | {"logit_scale": scale}).backward()
    assert (scale.grad is not None) == (rank == 0)
    for exact in (False, True):
        none = {"linear_weight": weight[:0], "target": torch.full((ROWS,), -100)}
        options = {"reduction": "none", "split_invariant": exact}
        assert not F.linear_cross_entropy(**arguments() | none, **options).any()


def check_soft_cap(rank: int) -> None:
    """Logits near the cap: the slope there, 1 - tanh^2, is small, and has all its digits."""
    g = torch.Generator().manual_seed(6)
    cap, x, target = 2.0, torch.eye(FEATURES), torch.arange(FEATURES)
    w = (3 + 2 * torch.rand(CLASSES * dist.get_world_size(), FEATURES, generator=g)) * cap
    z = (x.double() @ w.double().T) / cap
    p = torch.softmax(cap * torch.tanh(z), 1)
    p[target, target] -= 1
    want = (p / torch.cosh(z) ** 2).T @ x.double()
    mine = slice(rank * CLASSES, (rank + 1) * CLASSES)
    leaf = w[mine].clone().requires_grad_()
    F.linear_cross_entropy(
        x, leaf, target, softcap=cap, reduction="sum", process_group=dist.group.WORLD
    ).backward()
    torch.testing.assert_close(leaf.grad.double(), want[mine], rtol=1e-5, atol=0)  # type: ignore[union-attr]


def check_infinite_weight() -> None:
    """The weight of a class counts in rows of that class only."""
    for value in (float("inf"), float("nan")):
        given = arguments()
        weight = torch.ones(CLASSES * dist.get_world_size())
        weight[2] = value
        given["input"].requires_grad_()
        F.linear_cross_entropy(**given, weight=weight, reduction="sum").backward()
        assert torch.equal(given["input"].grad.isfinite().all(1), given["target"] != 2)
