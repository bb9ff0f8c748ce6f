"""mbkern.flush_ against fp64, its bits, and what it refuses."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from same_bits import check_same_bits
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test says otherwise
SIZES = (0, 1, 31, 33, 512, 513, 4097, 50_001)
PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
)
PENALTIES = ((0.0, 0.0), (0.0, 0.3), (0.02, 0.0), (0.02, 0.3))
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def make(of: torch.dtype, to: torch.dtype) -> Lists:
    """Gradients, buffers, parameters; two of them in other layouts."""
    random = torch.Generator().manual_seed(0)
    buffers = [torch.randn(n, generator=random, dtype=of) for n in SIZES]
    buffers.append(torch.randn(6, 7, 8, generator=random, dtype=of).transpose(0, 2))
    parameters = [torch.randn(b.shape, generator=random).to(to) for b in buffers]
    buffers.append(torch.randn(3, 5, 9, 9, dtype=of).to(memory_format=torch.channels_last))
    parameters.append(torch.randn(3, 5, 9, 9).to(to).to(memory_format=torch.channels_last))
    parameters[5][:3] = torch.tensor([0.0, -0.0, 2.0])
    return [torch.full_like(p, 7) for p in parameters], buffers, parameters


@pytest.mark.parametrize("max_norm", [None, 5.0, 1e6])
@pytest.mark.parametrize(("l1", "l2"), PENALTIES)
@pytest.mark.parametrize(("of", "to"), PAIRS)
def test_values(
    isa: str, of: torch.dtype, to: torch.dtype, l1: float, l2: float, max_norm: float | None
) -> None:
    grads, buffers, parameters = make(of, to)
    kept = [b.clone() for b in buffers]
    stats = mbkern.flush_(
        grads,
        buffers,
        denominator=torch.tensor(37),
        grad_scale=torch.tensor(8.0),
        factor=2,
        parameters=parameters,
        l1=l1,
        l2=l2,
        max_norm=max_norm,
    )
    scale = 2 / (37 * 8)
    exact = [
        scale * b.double() + l2 * p.double() + l1 * p.double().sign()
        for b, p in zip(buffers, parameters, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(kept, buffers, strict=True))
    squares = torch.stack([v.square().sum() for v in exact])
    norm = squares.sum().sqrt()
    # Every v is computed with at most five roundings of its terms.
    unit = torch.finfo(of).eps
    assert abs(stats.norm - norm) <= 5 * unit * norm
    assert ((stats.squared_norms - squares).abs() <= 10 * unit * squares).all()
    assert stats.found_inf == 0
    assert stats.found_inf.dtype == torch.float32
    clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm.item() + 1e-6))
    assert abs(stats.clip_factor - clip) <= 6 * unit
    value = sum(float((l1 * p.double().abs() + l2 / 2 * p.double() ** 2).sum()) for p in parameters)
    assert abs(stats.penalty.item() - value) <= 1e-6 * value
    for g, v, b, p in zip(grads, exact, buffers, parameters, strict=True):
        terms = scale * b.double().abs() + l2 * p.double().abs() + l1
        allowed = 5 * unit * terms * clip + torch.finfo(to).eps * v.abs() * clip
        tiny = torch.finfo(to).smallest_normal * torch.finfo(to).eps
        assert ((g.double() - clip * v).abs() <= allowed + tiny).all()


def test_plain_flush_is_one_product() -> None:
    grads, buffers, _ = make(torch.float32, torch.float32)
    mbkern.flush_(grads, buffers, denominator=10)
    assert all(torch.equal(g, b * 0.1) for g, b in zip(grads, buffers, strict=True))


def test_clips_as_torch_does() -> None:
    grads, buffers, _ = make(torch.float32, torch.float32)
    parameters = [torch.nn.Parameter(b.clone()) for b in buffers]
    for p, b in zip(parameters, buffers, strict=True):
        p.grad = b.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 3.0)
    stats = mbkern.flush_(grads, buffers, max_norm=3.0)
    assert torch.allclose(stats.norm.float(), norm, rtol=1e-6)
    for g, p in zip(grads, parameters, strict=True):
        assert torch.allclose(g, p.grad, rtol=2e-6, atol=0)


def test_in_place() -> None:
    _, buffers, parameters = make(torch.float32, torch.float32)
    grads = [torch.empty_like(b) for b in buffers]
    options: dict[str, Any] = {"denominator": 9, "parameters": parameters, "l2": 0.1, "max_norm": 2}
    mbkern.flush_(grads, buffers, **options)
    mbkern.flush_(buffers, buffers, **options)
    assert all(torch.equal(g, b) for g, b in zip(grads, buffers, strict=True))


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_nothing_was_counted(zero: Any) -> None:
    grads, buffers, parameters = make(torch.float32, torch.bfloat16)
    for b in buffers:
        b.zero_()
    stats = mbkern.flush_(grads, buffers, denominator=zero, max_norm=1.0)
    assert all((g == 0).all() for g in grads)
    assert (stats.norm, stats.found_inf, stats.clip_factor) == (0, 0, 1)
    mbkern.flush_(grads, buffers, denominator=zero, parameters=parameters, l2=0.5)
    exact = [(0.5 * p.float()).to(torch.bfloat16) for p in parameters]
    assert all(torch.equal(g, e) for g, e in zip(grads, exact, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_not_finite(bad: float, max_norm: float | None) -> None:
    for at in (0, 40, 50_000):
        grads, buffers, _ = make(torch.float32, torch.float16)
        buffers[7][at] = bad
        stats = mbkern.flush_(grads, buffers, max_norm=max_norm)
        assert stats.found_inf == 1
        assert stats.squared_norms.isfinite().tolist() == [k != 7 for k in range(len(buffers))]
        assert not grads[7][at].isfinite()


@pytest.mark.parametrize("l2", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_infinite_scale(dtype: torch.dtype, l2: float) -> None:
    """The norm is infinite, no NaN of what lies past the last element."""
    for size in (1, 2, 31, 32, 33, 70):
        buffers, grads = torch.ones(size), torch.zeros(size, dtype=dtype)
        stats = mbkern.flush_(
            grads, buffers if dtype is not torch.float64 else buffers.double(), grad_scale=0.0,
            parameters=[torch.ones(size, dtype=dtype)], l2=l2,
        )  # fmt: skip
        assert stats.norm == torch.inf
        assert stats.found_inf == 1
        assert (grads == torch.inf).all()


def test_measures_without_writing() -> None:
    _, buffers, _ = make(torch.float32, torch.float32)
    stats = mbkern.flush_(None, buffers, max_norm=1.0)
    some = [torch.empty_like(b) if k % 2 else None for k, b in enumerate(buffers)]
    assert torch.equal(mbkern.flush_(some, buffers, max_norm=1.0).norm, stats.norm)
    assert all(
        torch.equal(g, b * stats.clip_factor.float())
        for g, b in zip(some, buffers, strict=True)
        if g is not None
    )


def test_penalties_for_each() -> None:
    grads, buffers, parameters = make(torch.float32, torch.float32)
    l1 = [0.1 * (k % 3) for k in range(len(buffers))]
    l2 = [0.2 * (k % 2) for k in range(len(buffers))]
    mbkern.flush_(grads, buffers, parameters=parameters, l1=l1, l2=l2)
    for k, grad in enumerate(grads):
        one = torch.empty_like(grad)
        mbkern.flush_(one, buffers[k], parameters=parameters[k], l1=l1[k], l2=l2[k])
        assert torch.equal(one, grad)


def digest(device: torch.device | str = "cpu") -> str:
    """Of gradients and statistics, for all dtypes and penalties."""
    torch.manual_seed(1)
    sha = hashlib.sha1()
    for of, to in PAIRS:
        for l1, l2 in PENALTIES:
            for max_norm in (None, 1.0):
                grads, buffers, parameters = (
                    [t.to(device) for t in tensors] for tensors in make(of, to)
                )
                if max_norm:
                    buffers[4][3] = float("nan") if l1 else 1e30
                stats = mbkern.flush_(
                    grads,
                    buffers,
                    denominator=torch.tensor(7.0, device=device),
                    parameters=parameters,
                    l1=l1,
                    l2=l2,
                    max_norm=max_norm,
                )
                for t in (*grads, *stats):
                    sha.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def test_bits(isa: str) -> None:
    check_same_bits(isa, digest)


def test_cuda_gives_the_bits_of_the_cpu(device: torch.device) -> None:
    on_device = digest(device)
    _C.cuda_switch_shim(False)
    assert digest() == on_device


@pytest.mark.cpu
def test_numpy() -> None:
    grad, buffer = np.zeros((3, 4), np.float16), np.full((3, 4), 6, np.float32)
    stats = mbkern.flush_(grad, buffer, denominator=3)
    assert (grad == 2).all()
    assert abs(stats.norm.item() - 48**0.5) < 1e-12


def test_versions_and_leaves() -> None:
    grad, buffer = torch.zeros(3), torch.ones(3)
    before = grad._version
    mbkern.flush_(grad, buffer)
    assert grad._version > before
    with pytest.raises(RuntimeError, match=r"grads\[0\] requires grad"):
        mbkern.flush_(torch.nn.Parameter(torch.zeros(3)), buffer)


def test_nothing() -> None:
    assert mbkern.flush_([], []).norm == 0
    assert mbkern.flush_(torch.zeros(0), torch.zeros(0), max_norm=1.0).norm == 0


def bad_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    ten = torch.zeros(10)
    return [
        ({"grads": [ten, ten.clone()]}, ValueError, "one of grads for each buffer: 2 and 1"),
        ({"grads": torch.zeros(9)}, ValueError, r"buffers\[0\] is \(10,\).*grads\[0\] is \(9,\)"),
        ({"buffers": ten.half()}, TypeError, "float16; it must be float32, float64 or bfloat16"),
        ({"buffers": ten.double(), "grads": ten.half()}, TypeError, "float64.*float16"),
        ({"buffers": ten[:5], "grads": ten[2:7]}, ValueError, "share memory"),
        ({"grads": ten.clone(), "parameters": None, "l2": 0.1}, ValueError, r"parameters\[0\] is"),
        ({"l1": -1.0, "parameters": ten.clone()}, ValueError, "l1 is -1.0"),
        ({"l2": [0.1, 0.2], "parameters": ten.clone()}, ValueError, "one for each buffer: 2 and 1"),
        ({"max_norm": -1.0}, ValueError, "max_norm is -1.0"),
        ({"max_norm": float("nan")}, ValueError, "max_norm is nan"),
        ({"parameters": torch.zeros(3)}, ValueError, r"parameters\[0\] is \(3,\)"),
        ({"grads": torch.zeros(1).expand(10)}, ValueError, "elements of grads"),
        ({"denominator": torch.zeros(2)}, ValueError, "denominator must be"),
        ({"grads": torch.zeros(10, dtype=torch.complex64)}, TypeError, "complex"),
        ({"buffers": torch.eye(3).to_sparse(), "grads": torch.eye(3)}, TypeError, "sparse"),
        ({"grads": torch.zeros(10, device="meta")}, NotImplementedError, "meta"),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_refusals(case: int) -> None:
    change, error, message = bad_calls()[case]
    call = {"grads": torch.full((10,), 7.0), "buffers": torch.ones(10), **change}
    with pytest.raises(error, match=message):
        mbkern.flush_(call.pop("grads"), call.pop("buffers"), **call)
    if "grads" in change and "buffers" not in change and isinstance(change["grads"], Tensor):
        first = torch.full((10,), 7.0)
        with pytest.raises((error, ValueError)):
            mbkern.flush_([first, change["grads"]], [torch.ones(10)] * 2, **call)
        assert (first == 7).all(), "something was written"
