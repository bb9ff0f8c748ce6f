"""nll_loss takes 256 items at a time, and clears the rest of their gradients, in every layout."""

from __future__ import annotations

import pytest
import torch

import mbkern

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(255, 7), (256, 7), (257, 1), (700, 130), (3, 5, 400), (2, 70, 300), (5, 3, 20, 31)]


def _arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=random).to(dtype)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=random)
    return x, torch.where(torch.rand(target.shape, generator=random) < 0.2, -100, target)


def _want(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-1 at the target, 0 elsewhere."""
    classes = torch.arange(x.shape[1]).view(-1, *[1] * (x.dim() - 2))
    return -(target.unsqueeze(1) == classes).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["dense", "channels last", "every other", "in place"])
def test_gradients_over_old_memory(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target = _arguments(shape, dtype)
    want = _want(x, target)
    items = torch.where(target == -100, 0, x.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1))
    loss_want = -items.double().sum()
    grad = torch.full_like(x, 7.0)
    if layout == "channels last":
        grad = torch.full_like(x.movedim(1, -1).contiguous(), 7.0).movedim(-1, 1)
    elif layout == "every other":
        grad = torch.full((*shape[:-1], 2 * shape[-1]), 7.0, dtype=dtype)[..., ::2]
    elif layout == "in place":
        grad = x
    loss, got = mbkern.loss_and_grad("nll_loss", x, target, grad_out=grad, reduction="sum")
    assert got is grad
    assert torch.equal(got, want)
    assert not torch.signbit(got[got == 0]).any()
    torch.testing.assert_close(loss.double(), loss_want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_no_cache_keeps(dtype: torch.dtype, offset: int) -> None:
    """From 32 MiB on they are written past the caches, from wherever they begin."""
    rows, columns = 600, 32001
    memory = torch.full((rows * columns + offset + 1,), 7.0, dtype=dtype)
    grad = memory[offset:-1].view(rows, columns)
    x = torch.zeros(1, 1, dtype=dtype).expand(rows, columns).contiguous()
    target = torch.arange(rows) * 53
    mbkern.loss_and_grad("nll_loss", x, target, grad_out=grad, reduction="sum")
    assert grad.nbytes >= 32 << 20
    assert torch.equal(grad[torch.arange(rows), target], -torch.ones(rows, dtype=dtype))
    assert grad.count_nonzero() == rows
    assert memory[:offset].tolist() == [7.0] * offset
    assert memory[-1] == 7.0
