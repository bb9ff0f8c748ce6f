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


def main(device: str, kind: str = "all") -> int:
    """Make every call; the status is 1 if bits differ from the CPU's."""
    differing = done = 0
    for call in calls(kind == "few"):
        done += 1
        ours = [r.cpu() for r in results(call, device)]
        theirs = results(call, "cpu")
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                differing += 1
                name, x, _, options = call
                print(f"{name} {tuple(x.shape)} {x.dtype} {options}: result {k} differs")
    print(f"{done} calls on {device}, {differing} results differ from the CPU's")
    return int(differing > 0 or done == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
