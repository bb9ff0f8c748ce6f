"""Rounding modes, flush-to-zero, threads and torch's switches: no bit changes, nor do they."""

from __future__ import annotations

import ctypes
import functools
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import mbkern
from mbkern import _C
from mbkern import functional as F

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("restored")]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Call = Callable[[], tuple[Tensor, ...]]

LIBM = ctypes.CDLL("libm.so.6")
ROUNDING = {"upward": 0x800, "downward": 0x400, "to zero": 0xC00}  # x86
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="NOT CHECKED: needs x86-64")


def bits(tensors: tuple[Tensor, ...]) -> list[bytes]:
    return [t.contiguous().view(-1).view(INTEGER[t.itemsize]).numpy().tobytes() for t in tensors]


@functools.cache
def calls(dtype: torch.dtype) -> dict[str, Call]:
    """Calls whose inputs exist, and whose results have denormals and roundings of every kind."""
    g = torch.Generator().manual_seed(2)
    compute = torch.promote_types(dtype, torch.float32)
    long = (8 * torch.randn(67, 300, generator=g)).to(dtype)
    short = long[:, :30].contiguous()
    weight = torch.rand(300, generator=g).to(compute)
    weight[::2] *= 1e-12  # so that the sum of the weights is no number of 53 bits
    item_weight = torch.rand(67, generator=g).to(compute)
    target = torch.randint(30, (67,), generator=g)
    probabilities = torch.rand(67, 300, generator=g).to(dtype)
    tiny = (long * 1e-4).to(dtype) if dtype is torch.float16 else (long * 1e-20).to(dtype)
    values = torch.cat((long.flatten(), (long * 1e-38).flatten())).float()

    def rows(x: Tensor, y: Tensor, **options: object) -> Call:
        return lambda: mbkern.loss_and_grad("cross_entropy", x, y, **options)

    def autograd(reduction: str, incoming: float) -> Call:
        shape = target.shape if reduction == "none" else ()
        factor = torch.full(shape, incoming, dtype=torch.float32).to(dtype)

        def call() -> tuple[Tensor, ...]:
            leaf = long.detach().requires_grad_()
            loss = F.cross_entropy(leaf, target, reduction=reduction)
            loss.backward(factor)
            assert leaf.grad is not None
            return loss.detach(), leaf.grad

        return call

    def exact() -> tuple[Tensor, ...]:
        total = mbkern.LossSum().add(values)
        return total.value(), total.value(3.0), total.value(dtype=torch.float64), total.state

    return {
        "long rows": rows(long, target, scale=1e-36),
        "short rows": rows(short, target, scale=1e-36),
        "class weights": rows(long, target, weight=weight, loss_dtype=torch.float64),
        "class weights, short": rows(short, target, weight=weight[:30]),
        "sample weights": rows(long, target, sample_weight=item_weight),
        "smoothing": rows(long, target, label_smoothing=0.1, weight=weight, z_loss=0.1),
        "softcap": rows(long, target, softcap=9.0),
        "probabilities": rows(long, probabilities, label_smoothing=0.1, weight=weight),
        "unreduced": rows(long, target, reduction="none"),
        "in float16": rows(long, target, reduction="none", loss_dtype=torch.float16),
        "mean in float16": rows(long, target, loss_dtype=torch.float16),
        "squared error": lambda: mbkern.loss_and_grad("mse_loss", tiny, -tiny, scale=3e-3),
        "half squared error": lambda: mbkern.loss_and_grad(
            "half_squared_error", long, tiny, reduction="none", scale=1e-37
        ),
        "weighted error": lambda: mbkern.loss_and_grad(
            "mse_loss", long, tiny, sample_weight=weight
        ),
        "autograd": autograd("mean", 1.0),
        "autograd, unreduced": autograd("none", 1e-37),
        "autograd, scaled": autograd("mean", 1e-34),
        "exact sum": exact,
    }


NAMES = list(calls(torch.float32))


def mxcsr() -> int:
    """Rounding mode, flush-to-zero and denormals-are-zero, without the exception flags."""
    environment = (ctypes.c_uint32 * 8)()
    LIBM.fegetenv(environment)
    return environment[7] & ~0x3F


@x86_only
@pytest.mark.parametrize("state", ["flush", *ROUNDING])
@pytest.mark.parametrize("name", NAMES)
def test_floating_point_state(name: str, state: str) -> None:
    default = mxcsr()
    for isa in _C.isas():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            _C.set_isa(isa)
            call = calls(dtype)[name]
            want = bits(call())
            try:
                if state == "flush":
                    torch.set_flush_denormal(True)
                else:
                    LIBM.fesetround(ROUNDING[state])
                changed = mxcsr()
                got = call()
                after = mxcsr()
            finally:
                torch.set_flush_denormal(False)
                LIBM.fesetround(0)
            assert changed != default, "the state was not set: nothing is tested"
            assert after == changed, "the caller's state was not restored"
            assert mxcsr() == default
            assert bits(got) == want, f"{isa}, {dtype}"


@x86_only
def test_errors_restore_the_state() -> None:
    LIBM.fesetround(ROUNDING["upward"])
    before = mxcsr()
    try:
        with pytest.raises(IndexError):
            F.cross_entropy(torch.zeros(3, 5), torch.tensor([0, 5, 1]))
        assert mxcsr() == before
    finally:
        LIBM.fesetround(0)


def test_set_num_threads_is_obeyed_and_kept() -> None:
    every = calls(torch.float32)
    want = {name: bits(call()) for name, call in every.items()}
    for threads in (1, 2, 5, 16):
        torch.set_num_threads(threads)
        assert {name: bits(call()) for name, call in every.items()} == want
        assert torch.get_num_threads() == threads


def test_python_threads_at_once() -> None:
    every = calls(torch.float32)
    want = {name: bits(call()) for name, call in every.items()}

    def work(start: int) -> list[str]:
        names = NAMES[start:] + NAMES[:start]
        return [name for _ in range(5) for name in names if bits(every[name]()) != want[name]]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[]] * 8


def test_the_lock_is_released() -> None:
    """Python runs while a kernel does: a thread sees time pass between two of its steps.

    Once is enough: on a busy machine a thread may wait for other reasons.
    """
    x = torch.zeros(2000, 20_000)
    target = torch.zeros(2000, dtype=torch.int64)
    torch.set_num_threads(1)
    longest = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            seen: list[float] = []
            future = pool.submit(mbkern.loss_and_grad, "cross_entropy", x, target, grad_out=x)
            while not future.done():
                seen.append(time.perf_counter())
                time.sleep(0.001)
            end = time.perf_counter()
            longest.append(max(b - a for a, b in pairwise([*seen, end])) / (end - seen[0]))
            if len(seen) > 3 and longest[-1] < 0.5:
                return
    pytest.fail(f"Python stood still for {min(longest):.0%} of the call, or more")


def test_deterministic_algorithms() -> None:
    every = calls(torch.bfloat16)
    want = {name: bits(call()) for name, call in every.items()}
    torch.use_deterministic_algorithms(True)
    try:
        assert {name: bits(call()) for name, call in every.items()} == want
    finally:
        torch.use_deterministic_algorithms(False)
