"""mbkern.accumulate_ against fp64, its bits, its layouts, and what it refuses."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from same_bits import check_same_bits
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test says otherwise
SIZES = (0, 1, 7, 31, 32, 33, 511, 512, 513, 4095, 4096, 4097, 70_001)
PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float16),
)
FACTORS = ((1.0, 1.0), (0.3, 1.0), (1.0, 0.7), (-1.7, 0.25), (2, 0))
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "mixed")


def make(to: torch.dtype, of: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    buffers = [torch.randn(n, generator=random, dtype=to) for n in SIZES]
    grads = [torch.randn(n, generator=random).to(of) for n in SIZES]
    return buffers, grads


def expected(buffers: list[Tensor], grads: list[Tensor], alpha: float, beta: float) -> list[Tensor]:
    """In fp64, where the product of two fp32 numbers is exact; or as it is done in fp64."""
    results = []
    for b, g in zip(buffers, grads, strict=True):
        scaled = (b * torch.tensor(beta, dtype=b.dtype)).double()
        a = torch.tensor(alpha, dtype=b.dtype).double()
        results.append(a * g.double() + scaled)
    return results


@pytest.mark.parametrize(("alpha", "beta"), FACTORS)
@pytest.mark.parametrize(("to", "of"), PAIRS)
def test_values(isa: str, to: torch.dtype, of: torch.dtype, alpha: float, beta: float) -> None:
    buffers, grads = make(to, of)
    exact = expected(buffers, grads, alpha, beta)
    assert mbkern.accumulate_(buffers, grads, alpha, beta) is None
    for b, e in zip(buffers, exact, strict=True):
        if to == torch.float64:
            assert torch.equal(b, e)  # the same two roundings
        else:  # one rounding: half a unit in the last place, and the double sum's own rounding
            assert ((b.double() - e).abs() <= e.abs() * 2.0**-24 + 2.0**-149).all()


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
def test_one_addition_is_torchs(of: torch.dtype) -> None:
    buffers, grads = make(torch.float32, of)
    reference = [b + g.float() for b, g in zip(buffers, grads, strict=True)]
    mbkern.accumulate_(buffers, grads)
    assert all(torch.equal(a, b) for a, b in zip(buffers, reference, strict=True))


def layouts(kind: str, to: torch.dtype, of: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer and a gradient of one shape."""
    buffer = torch.randn(3, 5, 37, 41, dtype=to)
    grad = torch.randn(3, 5, 37, 41).to(of)
    if kind == "channels_last":
        return tuple(t.to(memory_format=torch.channels_last) for t in (buffer, grad))
    if kind == "transposed":
        return buffer.transpose(1, 3), grad.transpose(1, 3)
    if kind == "strided":
        wide = torch.randn(3, 5, 37, 82, dtype=to)[..., ::2]
        return wide, torch.randn(6, 5, 37, 41).to(of)[::2]
    if kind == "mixed":
        return buffer.to(memory_format=torch.channels_last), grad[:, :, :1].expand_as(buffer)
    return buffer, grad


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("to", "of"), PAIRS)
def test_layouts(isa: str, kind: str, to: torch.dtype, of: torch.dtype) -> None:
    buffer, grad = layouts(kind, to, of)
    strides, exact = buffer.stride(), buffer.double() + grad.double()
    measured = mbkern.accumulate_(buffer, grad, measure=True)
    assert buffer.stride() == strides
    assert torch.equal(buffer, exact.to(to))
    norm = grad.double().square().sum()
    assert (measured.squared_norms[0] - norm).abs() <= 1e-13 * norm


def test_what_lies_between_is_not_touched() -> None:
    wide = torch.full((40, 64), 7.0)
    mbkern.accumulate_(wide[3:33, 5:58], torch.ones(30, 53))
    assert (wide[3:33, 5:58] == 8).all()
    wide[3:33, 5:58] = 7
    assert (wide == 7).all()


def test_measured(isa: str) -> None:
    for to, of in PAIRS:
        buffers, grads = make(to, of)
        grads[6][4] = float("inf")
        grads[9][4000] = float("nan")
        measured = mbkern.accumulate_(buffers, grads, alpha=0.0, measure=True)
        exact = torch.stack([g.double().square().sum() for g in grads])
        assert measured.finite.tolist() == exact.isfinite().tolist()
        good = measured.finite
        error = (measured.squared_norms - exact)[good].abs()
        assert (error <= 1e-13 * exact[good]).all()


def test_fp32_squares_do_not_overflow() -> None:
    huge = torch.full((5000,), 3e38)
    measured = mbkern.accumulate_(torch.zeros(5000), huge, measure=True)
    assert measured.finite.all()


def digest(device: torch.device | str = "cpu") -> list[str]:
    """The bits of buffers and norms of all pairs of dtypes and layouts."""
    torch.manual_seed(0)
    lines = []
    for to, of in PAIRS:
        buffers, grads = make(to, of)
        for kind in LAYOUTS:
            b, g = layouts(kind, to, of)
            buffers.append(b)
            grads.append(g)
        grads[8][3] = float("nan")
        buffers = [b.to(device) for b in buffers]
        grads = [g.to(device) for g in grads]
        for alpha, beta in ((1.0, 1.0), (0.1, 0.9), (-3.0, 0.0)):
            measured = mbkern.accumulate_(buffers, grads, alpha, beta, measure=True)
            sha = hashlib.sha1()
            for t in (*buffers, measured.squared_norms):
                sha.update(t.cpu().contiguous().numpy().tobytes())
            lines.append(f"{to} {of} {alpha} {beta} {sha.hexdigest()}")
    return lines


def test_bits(isa: str) -> None:
    check_same_bits(isa, digest)


def test_bits_in_a_process_of_its_own() -> None:
    code = "import test_accumulate as t; print('\\n'.join(t.digest()))"
    results = {
        name: subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MBKERN_ISA": name, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in (_C.isas()[0], _C.isas()[-1])
    }
    assert len(set(results.values())) == 1
    assert results.popitem()[1].split() == "\n".join(digest()).split()


def test_cuda_gives_the_bits_of_the_cpu(device: torch.device) -> None:
    on_device = digest(device)
    _C.cuda_switch_shim(False)
    assert digest() == on_device


def test_how_a_list_is_cut_does_not_matter() -> None:
    buffers, grads = make(torch.float32, torch.bfloat16)
    copies = [b.clone() for b in buffers]
    norms = mbkern.accumulate_(buffers, grads, 0.1, 0.9, measure=True).squared_norms
    for k, (b, g) in enumerate(zip(copies, grads, strict=True)):
        one = mbkern.accumulate_(b, g, 0.1, 0.9, measure=True)
        assert torch.equal(one.squared_norms[0], norms[k])
        assert torch.equal(b, buffers[k])


def test_more_tensors_than_one_launch_holds() -> None:
    buffers = [torch.zeros(3, 4) for _ in range(1000)]
    grads = [
        torch.full((4, 3), float(k)).t() if k % 9 == 0 else torch.full((3, 4), float(k))
        for k in range(1000)
    ]
    measured = mbkern.accumulate_(buffers, grads, measure=True)
    assert all((b == k).all() for k, b in enumerate(buffers))
    assert measured.squared_norms.tolist() == [12.0 * k * k for k in range(1000)]


def test_numbers_may_be_tensors() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        b = torch.ones(100)
        mbkern.accumulate_(b, torch.ones(100), torch.tensor(3, dtype=dtype), torch.tensor(2.0))
        assert (b == 5).all()


def test_beta_zero_does_not_read() -> None:
    b = torch.full((77,), float("nan"))
    mbkern.accumulate_(b, torch.arange(77.0), beta=0)
    assert torch.equal(b, torch.arange(77.0))
    b = torch.full((77, 3), float("nan"))
    mbkern.accumulate_(b, torch.arange(77.0)[:, None].expand(77, 3), beta=torch.tensor(0.0))
    assert torch.equal(b, torch.arange(77.0)[:, None].expand(77, 3))


def test_nan_is_canonical() -> None:
    weird = torch.tensor([0x7F812345, -1], dtype=torch.int32).view(torch.float32)
    b = torch.zeros(2)
    mbkern.accumulate_(b, weird)
    assert (b.view(torch.int32) == 0x7FC00000).all()


@pytest.mark.cpu
def test_numpy() -> None:
    b, g = np.zeros((3, 4), np.float32), np.ones((3, 4), np.float16)
    mbkern.accumulate_(b, g, 2.0)
    assert (b == 2).all()
    mbkern.accumulate_([b, np.zeros(2)], (g, torch.ones(2)))
    assert (b == 3).all()
    b.flags.writeable = False
    with pytest.raises(ValueError, match=r"buffers\[0\] is a read-only array"):
        mbkern.accumulate_(b, g)
    with pytest.raises(ValueError, match=r"buffers\[0\] is a read-only array or a number"):
        mbkern.accumulate_(np.float32(0), torch.tensor(1.0))  # its sum would be lost
    with pytest.raises(TypeError, match=r"grads\[0\] is a masked array"):
        mbkern.accumulate_(np.zeros(3), np.ma.array(np.ones(3), mask=[1, 0, 0]))


def test_the_version_counter_moves() -> None:
    b = torch.zeros(3)
    before = b._version
    mbkern.accumulate_([b], [torch.ones(3)])
    assert b._version > before


def test_parameters_need_no_grad() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"buffers\[0\] requires grad"):
        mbkern.accumulate_(p, torch.ones(3))
    with torch.no_grad():
        mbkern.accumulate_(p, torch.ones(3))
    assert (p == 1).all()


def test_nothing() -> None:
    mbkern.accumulate_([], [])
    assert mbkern.accumulate_([], [], measure=True).squared_norms.shape == (0,)
    mbkern.accumulate_(torch.zeros(0, 3), torch.zeros(0, 3))


def bad_calls() -> list[tuple[object, object, type[Exception], str]]:
    one, ten = torch.zeros(1), torch.zeros(10)
    sparse = torch.eye(3).to_sparse()
    return [
        (ten, [ten.clone(), one], ValueError, "2 and 1|1 and 2"),
        (ten, torch.zeros(9), ValueError, r"buffers\[0\] is \(10,\).*grads\[0\] is \(9,\)"),
        (ten, torch.zeros(2, 5), ValueError, "one shape"),
        (ten.bfloat16(), ten.bfloat16(), TypeError, "bfloat16, whose 8 bits.*compensation="),
        (ten, ten.double(), TypeError, r"float32.*float64"),
        (ten, torch.zeros(10, dtype=torch.int64), TypeError, "int64"),
        (ten, torch.zeros(10, dtype=torch.complex64), TypeError, "complex64.*view_as_real"),
        (torch.zeros(3, 3), sparse, TypeError, "sparse.*to_dense"),
        (sparse, torch.zeros(3, 3), TypeError, "sparse"),
        (ten, ten, ValueError, r"buffers\[0\].*share memory|grads\[0\].*share memory"),
        (ten[:6], ten[4:], ValueError, "share memory"),
        ([ten[:6], ten[4:]], [torch.ones(6)] * 2, ValueError, "share memory"),
        (one.expand(10), torch.ones(10), ValueError, "elements of buffers"),
        (ten.as_strided((4, 4), (1, 2)), torch.ones(4, 4), ValueError, "elements of buffers"),
        (ten, torch.zeros(10, device="meta"), NotImplementedError, "meta"),
        (ten, torch._neg_view(torch.ones(10)), ValueError, "resolve_neg"),
        (ten, "grads", TypeError, "grads must be"),
        (ten, [None], TypeError, r"grads\[0\] must be a tensor, not NoneType"),
        (ten, 3.0, TypeError, "grads must be"),
        (torch.zeros((1, 2) * 5).transpose(1, 3), torch.zeros((1, 2) * 5), ValueError, "10 dimens"),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_refusals(case: int) -> None:
    buffers, grads, error, message = bad_calls()[case]
    good = torch.zeros(5)
    buffers = [good, *buffers] if isinstance(buffers, list) else [good, buffers]
    if isinstance(grads, (str, float)):
        with pytest.raises(error, match=message):
            mbkern.accumulate_(good, grads)
        return
    grads = [torch.ones(5), *grads] if isinstance(grads, list) else [torch.ones(5), grads]
    message = message.replace("[0]", "[1]")
    message = message.replace(r"\[0\]", r"\[1\]").replace("2 and 1|1 and 2", "3 and 2")
    with pytest.raises(error, match=message):
        mbkern.accumulate_(buffers, grads)
    assert (good == 0).all(), "something was written"


def test_fake_and_functorch_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(TypeError, match="FakeTensor"):
        mbkern.accumulate_(torch.zeros(3), fake)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: mbkern.accumulate_(torch.zeros(3), x))(torch.ones(2, 3))


def test_gradient_of_two_buffers() -> None:
    g, a, b = torch.ones(100), torch.zeros(100), torch.zeros(100)
    mbkern.accumulate_([a, b], [g, g])
    assert (a == 1).all()
    assert (b == 1).all()
