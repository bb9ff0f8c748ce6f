"""The fused head under hooks of saved tensors (checkpoints, offloading): it holds no gradients
until backward, and has the same bits."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint
from torch_versions import tells_of_hooks

import mbkern.functional as F

Way = Callable[[Callable[..., Tensor], Any], Tensor]


def _plain(function: Callable[..., Tensor], tensors: Any) -> Tensor:
    return function(*tensors)


def _copies(function: Callable[..., Tensor], tensors: Any) -> Tensor:
    with graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return function(*tensors)


def _checkpointed(function: Callable[..., Tensor], tensors: Any) -> Tensor:
    result: Tensor = checkpoint(function, *tensors, use_reentrant=False)
    return result


def _tensors(dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(4)
    shapes = ((20, 16), (50, 16), (50,))
    return [torch.randn(s, generator=random).to(dtype).requires_grad_() for s in shapes]


TARGET = torch.arange(20) * 7 % 50


@pytest.mark.parametrize("way", [_copies, _checkpointed])
@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        (torch.float32, None), (torch.float32, 3.0), (torch.float64, None), (torch.bfloat16, None),
        (torch.bfloat16, 8.0), (torch.float16, torch.tensor(1024.0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_bits(way: Way, dtype: torch.dtype, hint: Any, reduction: str) -> None:
    """Those of a call without hooks, the graph kept or not."""

    def run(way: Way) -> list[Tensor]:
        leaves = _tensors(dtype)

        def head(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            loss = F.linear_cross_entropy(
                x, w, TARGET, linear_bias=b, reduction=reduction, grad_scale=hint
            )
            return loss.sum()

        loss = way(head, leaves)
        found = [loss.detach()]
        for factor, keep in ((1.0, True), (0.3, False)):
            incoming = torch.tensor(factor, dtype=loss.dtype)
            found += torch.autograd.grad(loss, leaves, incoming, retain_graph=keep)
        return found

    got, want = run(way), run(_plain)
    assert len(got) == len(want) == 7
    assert all(map(torch.equal, got, want))


@tells_of_hooks
@pytest.mark.parametrize(
    "hooks",
    [contextlib.nullcontext, lambda: graph.saved_tensors_hooks(lambda t: t, lambda t: t)],
    ids=["plain", "hooks"],
)
def test_what_is_held(hooks: Callable[[], Any]) -> None:
    """Without hooks the weight's gradient is there until backward; with them it is not."""
    x = torch.randn(20, 16, requires_grad=True)
    w = torch.randn(53, 16, requires_grad=True)
    with hooks():
        loss = F.linear_cross_entropy(x, w, TARGET)
    gc.collect()
    like = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == w.shape and t is not w]
    held = loss.grad_fn.formed  # type: ignore[union-attr]
    assert (held is None) is (hooks is not contextlib.nullcontext)
    assert bool(like) <= (hooks is contextlib.nullcontext)
    loss.backward()
    assert w.grad is not None


class _Saves(torch.autograd.Function):
    """Another function, which saves what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[None, ...]:
        raise AssertionError("nothing is to be taken from it")


@tells_of_hooks
def test_a_checkpoint_that_runs_another_function_again_raises() -> None:
    """Tensors of the same shapes and order are not enough: a checkpoint compares nothing else."""
    x, w, b = _tensors(torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.linear_cross_entropy(x, w, TARGET, linear_bias=b)
    same = [tensor for tensor in saved if tensor.ndim < 7]
    assert len(same) == 4, "input, weight, bias, target, and a mark"
    ours = [True]

    def head(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if ours[0]:
            return F.linear_cross_entropy(x, w, TARGET, linear_bias=b)
        return _Saves.apply(x, *same)

    loss = checkpoint(head, x, w, b, use_reentrant=False)
    ours[0] = False
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
