"""Small calls that reach every kernel, for compute-sanitizer: ``small_calls.py DEVICE [few]``.

Row lengths from one warp to a cluster of blocks, aligned and not; every dtype and every way a
gradient is written. Each result must have the bits of the CPU's, so a fault is seen in either way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mbkern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COLUMNS = (1, 7, 64, 1000, 1001, 5000, 40_000, 140_001)
ITEMS = 5
# For the tool that watches every access of shared memory, a thousand times slower.
FEW_DTYPES, FEW_COLUMNS = (torch.float32, torch.bfloat16), (7, 1000, 1001, 5000, 20_000)

Call = tuple[str, Tensor, Tensor, dict[str, Any]]  # a loss, its tensors, its options


def calls(few: bool) -> Iterator[Call]:
    """Every call, with tensors on the CPU."""
    random = torch.Generator().manual_seed(5)
    for dtype in FEW_DTYPES if few else DTYPES:
        for columns in FEW_COLUMNS if few else COLUMNS:
            x = (torch.randn(ITEMS, columns, generator=random) * 3).to(dtype)
            t = torch.randint(columns, (ITEMS,), generator=random)
            yield "cross_entropy", x, t, {}
            yield "cross_entropy", x, t, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
            if columns > 1:
                wide = torch.randn(ITEMS, columns + 3, generator=random).to(dtype)
                yield "cross_entropy", wide[:, 1 : columns + 1], t, {"reduction": "sum"}
                yield "cross_entropy", x, x.float().softmax(1).to(dtype), {}
        image = torch.randn(2, 21, 9, 11, generator=random).to(dtype)
        t = torch.randint(21, (2, 9, 11), generator=random)
        yield "cross_entropy", image, t, {"reduction": "none"}
        for size in (33, 4096) if few else (1, 33, 4096, 100_003):
            x, y = torch.randn(2, size, generator=random).to(dtype)
            yield "half_squared_error", x, y, {"reduction": "sum"}
            yield "mse_loss", x, y, {}


def results(call: Call, device: str) -> list[Tensor]:
    """The loss and the gradient, fresh, in place and accumulated, and the exact sum."""
    name, x, t, options = call
    x, t = x.to(device), t.to(device)
    double = x.dtype is torch.float64
    total = None if double else mbkern.LossSum(device=device)
    loss, grad = mbkern.loss_and_grad(name, x, t, loss_sum=total, **options)
    buffer = torch.ones_like(x, dtype=x.dtype if double else torch.float32)
    mbkern.loss_and_grad(name, x, t, grad_out=buffer, accumulate=True, **options)
    over = x.clone()
    mbkern.loss_and_grad(name, over, t, grad_out=over, **options)
    leaf = x.detach().clone().requires_grad_()
    function = getattr(mbkern.functional, name)
    function(leaf, t, **options).sum().mul(3).backward()
    assert leaf.grad is not None
    found = [loss, grad, buffer, over, leaf.grad]
    return found if total is None else [*found, total.value(dtype=torch.float64)]


def heads(few: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Input, weight, bias and target of fused heads; their products are tiles of 16 by 16."""
    random = torch.Generator().manual_seed(6)
    for dtype in FEW_DTYPES if few else DTYPES:
        for features, classes in ((37, 1000),) if few else ((1, 7), (64, 64), (37, 1000)):
            x, w, b = (
                torch.randn(shape, generator=random).to(dtype)
                for shape in ((ITEMS, features), (classes, features), (classes,))
            )
            yield x, w, b, torch.randint(classes, (ITEMS,), generator=random)


def head_results(tensors: tuple[Tensor, ...], device: str) -> list[Tensor]:
    """The loss and the gradients added into buffers, then by way of autograd, split-invariant:
    other products are torch's, in an order of each device's."""
    x, w, b, t = (tensor.to(device) for tensor in tensors)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    buffers = [torch.ones_like(v, dtype=wide) for v in (w, b)]
    loss, (dx, *_) = mbkern.loss_and_grad(
        "linear_cross_entropy", x, w, t, linear_bias=b, split_invariant=True, num_valid=len(t),
        argnums=("input", "linear_weight", "linear_bias"), grad_out=(None, *buffers),
        accumulate=True,
    )  # fmt: skip
    leaves = [v.detach().clone().requires_grad_() for v in (x, w, b)]
    again = mbkern.functional.linear_cross_entropy(
        leaves[0], leaves[1], t, linear_bias=leaves[2], split_invariant=True
    )
    return [loss, dx, *buffers, *torch.autograd.grad(again * 3, leaves)]


def differing(ours: list[Tensor], theirs: list[Tensor], what: str) -> int:
    """How many results have not the same bits; they are printed."""
    found = 0
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        bits = [tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        if not torch.equal(*bits):
            found += 1
            print(f"{what}: result {k} differs")
    return found


def main(device: str, kind: str = "all") -> int:
    """Make every call; the status is 1 if bits differ from the CPU's."""
    wrong = done = 0
    for call in calls(kind == "few"):
        done += 1
        name, x, _, options = call
        what = f"{name} {tuple(x.shape)} {x.dtype} {options}"
        wrong += differing(results(call, device), results(call, "cpu"), what)
    for tensors in heads(kind == "few"):
        done += 1
        what = f"linear_cross_entropy of {tuple(tensors[1].shape)} {tensors[1].dtype}"
        wrong += differing(head_results(tensors, device), head_results(tensors, "cpu"), what)
    print(f"{done} calls on {device}, {wrong} results differ from the CPU's")
    return int(wrong > 0 or done == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
