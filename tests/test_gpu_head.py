"""The fused head where CUDA's kernels run: its gradients in all ways, and that nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import Head, check, heads, leaves, limit
from test_accumulator_device import waiting_raises
from test_cuda import compare
from torch import Tensor

import mbkern
from mbkern import _C, _linear_call
from mbkern import functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
INCOMING = 1.5
Tensors = dict[str, Any]
Way = Callable[..., dict[str, Tensor]]


@pytest.fixture(autouse=True)
def torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU torch has no products of 16-bit matrices into float32: in the build for tests
    they are what they are on a GPU with a torch older than 2.8."""
    if _C.cuda_is_shim():
        for name in ("_has_out_dtype", "_has_wide_sums"):
            monkeypatch.setattr(_linear_call, name, lambda: False)


def through_autograd(t: Tensors, **options: Any) -> dict[str, Tensor]:
    """Way 1: gradients formed in forward, or of 16-bit operands without a hint in backward."""
    loss = F.linear_cross_entropy(**t, **options)
    grads = torch.autograd.grad(loss.sum() * INCOMING, list(leaves(t).values()))
    return {"loss": loss.detach(), **dict(zip(leaves(t), grads, strict=True))}


def into_a_buffer(t: Tensors, **options: Any) -> dict[str, Tensor]:
    """Way 2: backward computes the logits again, and adds the weight's gradient into a buffer."""
    weight = t["linear_weight"]
    buffer = torch.zeros(weight.shape, device=weight.device)
    loss = F.linear_cross_entropy(**t, **options, accumulate_into=buffer)
    (loss.sum() * INCOMING).backward()
    found = {name: leaf.grad for name, leaf in leaves(t).items() if leaf is not weight}
    return {"loss": loss.detach(), "linear_weight": buffer, **found}


def imperative(t: Tensors, **options: Any) -> dict[str, Tensor]:
    """Way 3: no autograd; the weight's and the bias's gradients are added into buffers."""
    names = tuple(leaves(t))
    buffers = tuple(
        torch.zeros(t[name].shape, device=t[name].device)
        if name in ("linear_weight", "linear_bias")
        else None
        for name in names
    )
    with torch.no_grad():
        loss, grads = mbkern.loss_and_grad(
            "linear_cross_entropy", **t, argnums=names, grad_out=buffers, accumulate=True,
            scale=INCOMING, **options,
        )  # fmt: skip
    return {"loss": loss, **dict(zip(names, grads, strict=True))}


WAYS: dict[str, Way] = {
    "autograd": through_autograd,
    "autograd with a hint": partial(through_autograd, grad_scale=4.0),
    "into a buffer": into_a_buffer,
    "imperative": imperative,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def moved(t: Tensors, device: torch.device) -> Tensors:
    """The arguments in a device's memory, leaves again."""
    return {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in t.items()
    }


def wide(dtype: torch.dtype) -> Tensors:
    """More than one tile of a product down, across and deep, and not a whole number of them."""
    g = torch.Generator().manual_seed(4)
    target = torch.randint(517, (43,), generator=g)
    target[::5] = -100
    return Head().tensors(dtype) | {
        "input": torch.randn(43, 37, generator=g).to(dtype).requires_grad_(),
        "linear_weight": torch.randn(517, 37, generator=g).to(dtype).requires_grad_(),
        "linear_bias": torch.randn(517, generator=g).to(dtype).requires_grad_(),
        "target": target,
    }


def against_float64(
    t: Tensors, head: Head, way: Way, dtype: torch.dtype, device: torch.device, **more: Any
) -> None:
    want = head.expected(t)
    wanted = torch.autograd.grad(want.sum() * INCOMING, list(leaves(t).values()))
    got = way(moved(t, device), **head.options(), **more)
    assert {tensor.device.type for tensor in got.values()} == {device.type}
    check(got.pop("loss").cpu(), want, head, limit("loss", dtype))
    assert got.keys() == leaves(t).keys()
    for name, b in zip(leaves(t), wanted, strict=True):
        check(got[name].cpu(), b, (name, head), limit(name, dtype))


@every_dtype
@every_way
def test_against_float64(way: Way, dtype: torch.dtype, device: torch.device) -> None:
    for head in heads():
        against_float64(head.tensors(dtype), head, way, dtype, device)


@every_dtype
@every_way
def test_chunk_by_chunk(way: Way, dtype: torch.dtype, device: torch.device) -> None:
    for reduction in ("mean", "none"):
        head = Head(reduction, softcap=6.0, smoothing=0.1, z_loss=1e-3)
        for chunk_bytes in (None, 5000, 1):
            against_float64(wide(dtype), head, way, dtype, device, chunk_bytes=chunk_bytes)


@every_way
def test_split_invariant_has_the_cpus_bits(way: Way, device: torch.device) -> None:
    """But of the gradient of a tensor as ``logit_scale``: torch's sum, in each device's order."""
    for dtype in (torch.float32, torch.bfloat16):
        for head in heads():
            if head.scale is True:
                continue
            options = {**head.options(), "split_invariant": True}
            run = partial(on, head.tensors(dtype), way, options)
            compare(run, device, f"{dtype}, {head}")
        for chunk_bytes in (None, 5000):
            options = {"split_invariant": True, "chunk_bytes": chunk_bytes, "softcap": 6.0}
            compare(partial(on, wide(dtype), way, options), device, f"{dtype}, {chunk_bytes}")


def on(t: Tensors, way: Way, options: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    return way(moved(t, device), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_split_invariant_for_every_cut(dtype: torch.dtype, device: torch.device) -> None:
    """The buffer's bits, whatever the cut here, are those of the CPU's batch in one piece."""
    t = wide(dtype)

    def run(device: torch.device, cut: tuple[int, ...] = (43,)) -> dict[str, Tensor]:
        there = moved({name: t[name].detach() for name in ("linear_weight", "linear_bias")}, device)
        like = torch.float64 if dtype is torch.float64 else torch.float32
        buffers = [torch.ones(v.shape, dtype=like, device=device) for v in there.values()]
        parts = []
        for x, target in zip(t["input"].detach().split(cut), t["target"].split(cut), strict=True):
            _, (dx, _, _) = mbkern.loss_and_grad(
                "linear_cross_entropy", x.to(device), there["linear_weight"], target.to(device),
                linear_bias=there["linear_bias"], denominator=30.0, split_invariant=True,
                argnums=("input", "linear_weight", "linear_bias"), accumulate=True,
                grad_out=(None, *buffers),
            )  # fmt: skip
            parts.append(dx)
        return {"input": torch.cat(parts), "weight": buffers[0], "bias": buffers[1]}

    want = compare(run, device, f"{dtype}, whole")
    for cut in ((1,) * 43, (20, 23), (42, 1), (7, 0, 36)):
        for name, tensor in run(device, cut).items():
            assert torch.equal(tensor.cpu(), want[name]), (cut, name)


@every_dtype
@every_way
def test_a_known_number_of_rows(way: Way, dtype: torch.dtype, device: torch.device) -> None:
    """Given how many count, the others are left out: what they hold has no say."""
    for reduction in ("mean", "sum", "none"):
        t, head = wide(dtype), Head(reduction)
        ignored = t["target"] == -100
        known = int((~ignored).sum())
        against_float64(t, head, way, dtype, device, num_valid=known)
        without = way(moved(t, device), reduction=reduction, num_valid=known)
        with torch.no_grad():
            t["input"][ignored] = float("nan")
        spoiled = way(moved(t, device), reduction=reduction, num_valid=known)
        for name, tensor in spoiled.items():
            assert torch.equal(tensor, without[name]), (reduction, name)
        assert (spoiled["input"].cpu()[ignored] == 0).all()


@every_dtype
@every_way
def test_ignored_rows(way: Way, dtype: torch.dtype, device: torch.device) -> None:
    """They count nothing; where all are, a mean is NaN and a sum 0, and so are the gradients."""
    t = wide(dtype)
    got = way(moved(t, device), reduction="none")
    ignored = t["target"] == -100
    assert (got["loss"].cpu()[ignored] == 0).all()
    assert (got["input"].cpu()[ignored] == 0).all()
    assert (got["input"].cpu()[~ignored] != 0).any(1).all()
    t["target"].fill_(-100)
    assert way(moved(t, device))["loss"].isnan()
    for name, tensor in way(moved(t, device), reduction="sum").items():
        assert (tensor == 0).all(), name


@every_dtype
@every_way
@pytest.mark.parametrize("bad", [-1, 517, 2**31, 2**63 - 1])
def test_a_bad_target(bad: int, way: Way, dtype: torch.dtype, device: torch.device) -> None:
    """Its loss and its row are NaN, the others' are as without it, and the device takes a note."""
    t = wide(dtype)
    want = way(moved(t, device), reduction="none")
    t["target"][8] = bad
    mbkern.take_target_errors()
    got = way(moved(t, device), reduction="none")
    assert mbkern.take_target_errors() == mbkern.TargetErrors(1, 8, bad, 517)
    assert mbkern.take_target_errors().count == 0
    others = torch.arange(43) != 8
    for name in ("loss", "input"):
        assert got[name][8].isnan().all(), name
        assert torch.equal(got[name].cpu()[others], want[name].cpu()[others]), name
    assert got["linear_weight"].isnan().all()
    assert way(moved(t, device))["loss"].isnan()
    assert mbkern.take_target_errors().count == 1


@every_dtype
@every_way
def test_nothing_waits(way: Way, dtype: torch.dtype, gpu: torch.device) -> None:
    calls = [(moved(head.tensors(dtype), gpu), head.options()) for head in heads()]
    t = wide(dtype)
    more: tuple[dict[str, Any], ...] = (
        {}, {"num_valid": int((t["target"] != -100).sum())}, {"split_invariant": True},
        {"chunk_bytes": 5000}, {"denominator": torch.full((), 30.0, device=gpu)},
    )  # fmt: skip
    calls += [(moved(t, gpu), options) for options in more]
    with waiting_raises(gpu):
        for arguments, options in calls:
            way(arguments, **options)
