"""The fused head, forward + backward, against the matrix products that it consists of.

The limits are the bare products of the same chunks by torch: logits, ``G W`` and ``G^T X``, three;
four where backward computes the logits again. Everything else (the loss, sums in float32, packing)
has to fit between. Gradients that are returned are fresh each time, and dropped outside the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from suite_settings import Settings, progress
from torch import Tensor

import mbkern
import mbkern.functional as M
from mbkern import _C
from mbkern.bench.allocator import DEFAULT, RECYCLED, environment
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Way, interleave
from suites.memory import _MAPPED, MIB
from suites.problem import TOLERANCE

STATES = (RECYCLED,)
SUITE, MEMORY = "head", "head-memory"
THREE, FOUR = "three products", "four products"
UNFUSED, CHUNKED = "torch", "torch chunked"
FORWARD, BACKWARD, IMPERATIVE = "formed in forward", "into a buffer", "imperative"
SPLIT_BACKWARD, SPLIT_IMPERATIVE = "into a buffer, split-invariant", "imperative, split-invariant"
AVX2, AVX2_FAST = "avx2, imperative, split-invariant", "avx2, imperative"
AVX2_BACKWARD = "avx2, into a buffer, split-invariant"
AVX2_BACKWARD_FAST = "avx2, into a buffer"
SHAPES = ((1024, 512, 32000), (2048, 768, 50257))
QUICK = ((256, 128, 8000),)
CHUNK = 64 << 20
LARGE = (4096, 512, 128256)  # for memory: unfused, the logits alone take 2 GB


class Problem:
    """One head's tensors, and the ways to its gradients."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        rows, features, classes = shape
        g = torch.Generator().manual_seed(6)
        self.x = torch.randn(rows, features, generator=g).to(dtype).requires_grad_()
        w = torch.randn(classes, features, generator=g) * 0.05
        self.w = w.to(dtype).requires_grad_()
        self.target = torch.randint(classes, (rows,), generator=g)
        self.buffer = torch.zeros(classes, features)
        chunks = -(-rows * classes * dtype.itemsize // CHUNK)
        self.step = -(-rows // chunks)
        self.logits = torch.empty(self.step, classes, dtype=dtype)
        self.sums = torch.zeros(classes, features, dtype=dtype)

    def products(self, logits: int) -> Tensor:
        """The bare products, into memory that is there."""
        x, w = self.x.detach(), self.w.detach()
        dx = torch.empty_like(x)
        for first in range(0, len(x), self.step):
            part = x[first : first + self.step]
            z = self.logits[: len(part)]
            for _ in range(logits):
                torch.mm(part, w.t(), out=z)
            torch.mm(z, w, out=dx[first : first + self.step])
            torch.addmm(self.sums, z.t(), part, out=self.sums)
        return dx

    def through(self, head: Callable[..., Tensor], **options: Any) -> Tensor:
        """Loss and gradients by autograd; the input's gradient."""
        loss = head(self.x, self.w, self.target, **options)
        loss.backward()  # type: ignore[no-untyped-call]
        grad = self.x.grad
        assert grad is not None
        self.x.grad = self.w.grad = None
        return grad

    def imperative(self, **options: Any) -> Tensor:
        """The weight's gradient added in place; the input's gradient."""
        _, (grad, _) = mbkern.loss_and_grad(
            "linear_cross_entropy", self.x.detach(), self.w.detach(), self.target,
            argnums=(0, 1), grad_out=(None, self.buffer), accumulate=True, **options,
        )  # fmt: skip
        return grad


def _unfused(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target)


def _chunked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(x, w, target, options=options)
    return loss


def _on_avx2(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        before = _C.isa()
        _C.set_isa("avx2")
        try:
            return way()
        finally:
            _C.set_isa(before)

    return run


def _ways(p: Problem, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every way to a head's gradients, by name."""
    ways: dict[str, Callable[[], Tensor]] = {
        FORWARD: lambda: p.through(M.linear_cross_entropy, grad_scale=1.0),
        BACKWARD: lambda: p.through(M.linear_cross_entropy, accumulate_into=p.buffer),
        IMPERATIVE: lambda: p.imperative(),
        SPLIT_BACKWARD: lambda: p.through(
            M.linear_cross_entropy, accumulate_into=p.buffer, split_invariant=True
        ),
        SPLIT_IMPERATIVE: lambda: p.imperative(split_invariant=True),
        UNFUSED: lambda: p.through(_unfused),
    }
    if "avx2" in _C.isas():
        ways[AVX2] = _on_avx2(ways[SPLIT_IMPERATIVE])
        if dtype == torch.float32:
            ways[AVX2_FAST] = _on_avx2(ways[IMPERATIVE])
            ways[AVX2_BACKWARD] = _on_avx2(ways[SPLIT_BACKWARD])
            ways[AVX2_BACKWARD_FAST] = _on_avx2(ways[BACKWARD])
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        ways[CHUNKED] = lambda: p.through(_chunked)
    return ways


def _time(shape: tuple[int, int, int], dtype: torch.dtype, settings: Settings) -> Group:
    p = Problem(shape, dtype)
    small = slice(0, 32)
    few = Problem.__new__(Problem)
    few.__dict__ = {**p.__dict__, "x": p.x.detach()[small].clone().requires_grad_(),
                    "target": p.target[small]}  # fmt: skip
    exact = _unfused(wide := few.x.detach().double().requires_grad_(),
                     p.w.detach().double(), few.target)  # fmt: skip
    (wanted,) = torch.autograd.grad(exact, wide)
    errors = {name: _error(way, wanted) for name, way in _ways(few, dtype).items()}
    limits = {THREE: lambda: p.products(1), FOUR: lambda: p.products(2)}
    entries = interleave(
        [Way(name, run) for name, run in {**limits, **_ways(p, dtype)}.items()],
        settings.effort(20.0, least=3),
    )
    for entry in entries:
        entry.error = errors.get(entry.name)
        entry.correct = entry.error is None or entry.error <= TOLERANCE[dtype] * 4
    short = str(dtype).removeprefix("torch.")
    label = f"({shape[0]}, {shape[1]}) x {shape[2]} {short}"
    threads = torch.get_num_threads()
    return Group(
        SUITE, label, threads, settings.allocator, "ms", THREE, entries, shape[2], short
    )  # fmt: skip


def _error(way: Callable[[], Tensor], wanted: Tensor) -> float:
    return float((way().double() - wanted).abs().max() / wanted.abs().max())


def _memory(settings: Settings) -> Group:
    shape = QUICK[0] if settings.quick else LARGE
    entries = []
    for way in (UNFUSED, FORWARD, IMPERATIVE):
        asked = {"head": shape, "dtype": "float32", "way": way, "threads": max(settings.threads)}
        worker = Path(__file__).with_name("memory_worker.py")
        done = subprocess.run(
            [sys.executable, str(worker), json.dumps(asked)],
            capture_output=True, text=True, check=False, env={**environment(DEFAULT), **_MAPPED},
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            entries.append(Entry(way, note=f"skipped: {lines[-1][:100]}"))
        else:
            answer = json.loads(done.stdout)
            entries.append(Entry(way, [answer["bytes"] / MIB], note=answer["method"]))
    return Group(
        MEMORY, f"({shape[0]}, {shape[1]}) x {shape[2]} float32", max(settings.threads),
        settings.allocator, "MiB", UNFUSED, entries, shape[2],
    )  # fmt: skip


def run(settings: Settings) -> list[Group]:
    """Both shapes and dtypes at every number of threads, then the peak of memory."""
    groups = []
    for threads in settings.threads:
        torch.set_num_threads(threads)
        for shape in QUICK if settings.quick else SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                progress(f"head {shape} {dtype}", threads)
                groups.append(_time(shape, dtype, settings))
    return [*groups, _memory(settings)]
