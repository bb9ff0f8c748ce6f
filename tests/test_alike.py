"""The shortest way of a loss of two tensors: what may take it, and that nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mbkern
from mbkern import _C, _launch
from mbkern.functional import _ends

pytestmark = pytest.mark.skipif(
    not _launch.has_exchange_table, reason="this torch has no exchange table"
)

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (2, 0, 3)])
def test_plain_tensors_are_alike(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    assert _C.are_alike(a, b)
    assert _C.are_alike(a, a)
    assert _C.are_alike(torch.nn.Parameter(a), b)
    assert _C.are_alike(a.t() if len(shape) == 2 else a, b.t() if len(shape) == 2 else b)


def _others() -> dict[str, Any]:
    with FakeTensorMode():
        fake = torch.zeros(3, 4)
    return {
        "none": None,
        "number": 1.0,
        "text": "a",
        "array": torch.zeros(3, 4).numpy(),
        "dtype": torch.zeros(3, 4, dtype=torch.float64),
        "integers": torch.zeros(3, 4, dtype=torch.int64),
        "booleans": torch.zeros(3, 4, dtype=torch.bool),
        "complex": torch.zeros(3, 4, dtype=torch.complex64),
        "transposed": torch.zeros(4, 3),
        "flat": torch.zeros(12),
        "broadcast": torch.zeros(1, 4),
        "one dimension more": torch.zeros(3, 4, 1),
        "subclass": torch.zeros(3, 4).as_subclass(Subclass),
        "fake": fake,
        "meta": torch.zeros(3, 4, device="meta"),
        "sparse": torch.zeros(3, 4).to_sparse(),
        "freed": _freed(),
    }


def _freed() -> torch.Tensor:
    t = torch.zeros(3, 4)
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("name", list(_others()))
def test_others_are_not(name: str) -> None:
    plain, other = torch.zeros(3, 4), _others()[name]
    assert not _C.are_alike(plain, other)
    assert not _C.are_alike(other, plain)
    if name in ("integers", "booleans", "complex", "subclass", "fake", "meta", "sparse", "freed"):
        assert not _C.are_alike(other, other)


def test_most_calls_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with anything to look at, a call does not."""
    x, t = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    want = mbkern.functional.mse_loss(x, t).detach()
    taken: list[bool] = []

    def one_shape(*args: Any) -> Any:
        taken.append(False)
        return found(*args)

    found = _ends._one_shape
    monkeypatch.setattr(_ends, "_one_shape", one_shape)
    for reduction in ("none", "mean", "sum"):
        mbkern.functional.mse_loss(x, t, reduction=reduction)
    mbkern.nn.HuberLoss(delta=0.5)(x, t)
    mbkern.functional.l1_loss(x.bfloat16(), t.bfloat16())
    assert not taken
    assert torch.equal(mbkern.functional.mse_loss(x, t, sample_weight=torch.ones(3, 4)), want)
    mbkern.functional.mse_loss(x, t.double())
    mbkern.functional.mse_loss(x * 1, t, inplace=True)
    with FlopCounterMode(display=False):
        mbkern.functional.mse_loss(x.detach(), t)
    torch.func.grad(mbkern.functional.mse_loss)(x.detach(), t)
    assert len(taken) == 5
    with pytest.raises(ValueError, match="'all' is not a valid reduction"):
        mbkern.functional.mse_loss(x, t, reduction="all")
    with pytest.raises(NotImplementedError, match="no gradient for target"):
        mbkern.functional.soft_margin_loss(x, t.clone().requires_grad_())
