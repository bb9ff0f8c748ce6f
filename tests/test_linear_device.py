"""What the head cannot ask a device: whether targets are classes, and how many of them count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import process_group
import pytest
import torch
import torch.distributed as dist
from linear_cases import check
from torch import Tensor

import mbkern
from mbkern import _linear_rows
from mbkern import functional as F
from mbkern._linear_options import linear_options
from mbkern._linear_rows import LinearRows
from mbkern._linear_stats import of_logits

BAD = [11, 77, -1, 2**40]


def tensors() -> dict[str, Tensor]:
    """12 items, of which items 0, 4 and 8 are ignored."""
    g = torch.Generator().manual_seed(2)
    target = torch.randint(11, (12,), generator=g)
    target[::4] = -100
    return {
        "input": torch.randn(12, 5, generator=g),
        "linear_weight": torch.randn(11, 5, generator=g),
        "target": target,
    }


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are selected on the CPU as they are on CUDA."""
    monkeypatch.setattr(_linear_rows, "on_cuda", lambda _: True)


@contextmanager
def one_process(folder: Path) -> Iterator[Any]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    process_group.leave()


# ---- with the CPU's kernels ----------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("bad", BAD)
def test_no_address_is_formed_of_a_bad_class(bad: int) -> None:
    t = tensors()
    t["target"][5] = bad
    options = linear_options(*t.values(), None, weight=torch.rand(11))
    rows = LinearRows(t["input"], torch.Size((11, 5)), t["target"], options, torch.float32)
    divisor = rows.divisor()
    assert isinstance(divisor, Tensor)
    assert divisor.isfinite()
    z = t["input"] @ t["linear_weight"].t()
    counted, hit, _, _, log_prob = of_logits(z, t["target"], -100)
    assert counted[5]
    assert not hit[5]
    assert log_prob.masked_fill(~counted, 0).isnan().nonzero().tolist() == [[5]]


@pytest.mark.cpu
@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("known", [9, 10, 12, 100])
def test_num_valid_may_be_more(known: int) -> None:
    """Rows that are left over count nothing, and none is computed twice."""
    t = tensors()
    names = ("input", "linear_weight")
    for reduction in ("none", "mean"):
        want, wanted = mbkern.loss_and_grad(
            "linear_cross_entropy", **t, argnums=names, reduction=reduction
        )
        got, found = mbkern.loss_and_grad(
            "linear_cross_entropy", **t, argnums=names, reduction=reduction, num_valid=known
        )
        check(got, want, reduction, 1e-6)
        for a, b in zip(found, wanted, strict=True):
            check(a, b, reduction, 1e-6)


@pytest.mark.cpu
@pytest.mark.usefixtures("unasked")
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("more", [{}, {"split_invariant": True}, {"z_loss": 0.1}], ids=str)
def test_a_bad_class_over_processes(more: dict[str, Any], tmp_path: Path) -> None:
    t = tensors()
    t["target"][5] = 77
    with one_process(tmp_path) as group:
        x, w = (t[name].requires_grad_() for name in ("input", "linear_weight"))
        loss = F.linear_cross_entropy(**t, reduction="none", process_group=group, **more)
        loss.sum().backward()
    assert loss.isnan().nonzero().tolist() == [[5]]
    assert x.grad is not None
    assert x.grad.isnan().any(1).nonzero().tolist() == [[5]]
    assert w.grad is not None
    assert w.grad.isnan().all()


# ---- with CUDA's ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_class_on_cuda(bad: int, device: torch.device) -> None:
    """Its row is NaN, the error word is set, and the device lives on."""
    t = {name: tensor.to(device) for name, tensor in tensors().items()}
    t["target"][5] = bad
    weight = torch.rand(11, device=device)
    mbkern.take_target_errors()
    for more in ({}, {"num_valid": 9}):
        loss, stats = F.linear_cross_entropy(
            **t, weight=weight, reduction="none", return_stats=True, **more
        )
        assert loss.isnan().nonzero().tolist() == [[5]]
        assert stats.log_prob.isnan().nonzero().tolist() == [[5]]
        assert mbkern.take_target_errors().value == bad
    loss, grad = mbkern.loss_and_grad("linear_cross_entropy", **t, argnums=0, weight=weight)
    assert loss.isnan()
    assert grad.isnan().any(1).nonzero().tolist() == [[5]]
    assert mbkern.take_target_errors().count == 1


@pytest.mark.gpu
def test_num_valid_on_cuda(device: torch.device) -> None:
    t = {name: tensor.to(device) for name, tensor in tensors().items()}
    want = F.linear_cross_entropy(**t, reduction="none")
    for known in (9, 11, 12):
        got = F.linear_cross_entropy(**t, reduction="none", num_valid=known)
        check(got, want, known, 1e-6)
    check(F.linear_cross_entropy(**t, num_valid=11), F.linear_cross_entropy(**t), "mean", 1e-6)
