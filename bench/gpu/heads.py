"""Whole loss heads, forward and backward: the matrix products, and what the loss adds to them.

The limits are the bare products into memory that is there, three or, where backward computes the
logits again, four. Into float32 buffers go the gradients of the weight in the last two ways of
mbkern's; in all other ways they are fresh, in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from suites.problem import TOLERANCE, worse
from torch import Tensor

import mbkern
import mbkern.functional as M
from gpu.ways import EAGER
from mbkern.bench import peers
from mbkern.bench.peers import CUT, LIGER, LIGER_FP32, QUACK
from mbkern.bench.results import Entry, Group
from mbkern.bench.timing import Effort, Way, interleave

SUITE, MEMORY = "gpu, loss head", "gpu, memory of a loss head"
THREE, FOUR = "three products", "four products"
FORWARD, BUFFER, IMPERATIVE = "mbkern", "mbkern into a buffer", "mbkern imperative"
LOGITS = "torch and mbkern's loss"
CHUNKED = "torch chunked"
LIMIT_MIB = "1.2 GB"
SAMPLE = 16  # rows that are held to fp64
MIB = 2**20

Run = Callable[[], tuple[Tensor, Tensor]]  # to the loss and the gradient of the hidden states


class Head:
    """Hidden states, the matrix of classes, and targets, in bf16; logits of unit variance."""

    tolerance = 4 * TOLERANCE[torch.bfloat16]

    def __init__(self, rows: int, columns: int, width: int, device: str) -> None:
        random = torch.Generator(device).manual_seed(9)
        settings: dict[str, Any] = {"generator": random, "device": device}
        hidden = torch.randn(rows, width, **settings)
        classes = torch.randn(columns, width, **settings).div_(width**0.5)
        self.hidden = hidden.bfloat16().requires_grad_()
        self.classes = classes.bfloat16().requires_grad_()
        self.target = torch.randint(columns, (rows,), **settings)
        self._buffer: Tensor | None = None
        x = self.hidden.detach()[:SAMPLE].double().requires_grad_()
        logits = F.linear(x, self.classes.detach().double())
        few = self.target[:SAMPLE]
        (self._gradient,) = torch.autograd.grad(F.cross_entropy(logits, few, reduction="sum"), x)
        self._gradient /= rows

    @property
    def buffer(self) -> Tensor:
        """Of float32, for the weight's gradient."""
        if self._buffer is None:
            self._buffer = torch.zeros_like(self.classes, dtype=torch.float32)
        return self._buffer

    def restore(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.classes.grad = None

    def error(self, loss: Tensor, gradient: Tensor) -> float:
        """Of the gradient of the first hidden states, relative to the largest."""
        off = (gradient[:SAMPLE].double() - self._gradient).abs().max().item()
        return worse(0.0 if loss.isfinite() else float("nan"),
                     off / self._gradient.abs().max().item())  # fmt: skip

    def products(self, logits: int) -> Run:
        """The bare products, of as many rows at a time as the logits of 512 MiB have."""
        x, w = self.hidden.detach(), self.classes.detach()
        step = max(1, min(len(x), 512 * MIB // (2 * len(w))))
        z, dx, dw = w.new_empty(step, len(w)), torch.empty_like(x), torch.zeros_like(w)

        def run() -> tuple[Tensor, Tensor]:
            for first in range(0, len(x), step):
                part = x[first : first + step]
                for _ in range(logits):
                    torch.mm(part, w.t(), out=z[: len(part)])
                torch.mm(z[: len(part)], w, out=dx[first : first + step])
                torch.addmm(dw, z[: len(part)].t(), part, out=dw)
            return dx.sum(), dx

        return run


def _through(function: Callable[..., Tensor], **options: Any) -> Callable[[Head], Run]:
    def make(h: Head) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            loss = function(h.hidden, h.classes, h.target, **options)
            loss.backward()  # type: ignore[no-untyped-call]
            assert h.hidden.grad is not None
            return loss.detach(), h.hidden.grad

        return run

    return make


def _into_buffer(h: Head) -> Run:
    return _through(M.linear_cross_entropy, accumulate_into=h.buffer)(h)


def _imperative(h: Head) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        loss, (grad, _) = mbkern.loss_and_grad(
            "linear_cross_entropy", h.hidden.detach(), h.classes.detach(), h.target,
            argnums=(0, 1), grad_out=(None, h.buffer), accumulate=True,
        )  # fmt: skip
        return loss, grad

    return run


def _logits(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    loss: Tensor = M.cross_entropy(F.linear(x, w), t, inplace=True, grad_scale=1.0)
    return loss


def _chunked(h: Head) -> Run:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise peers.Absent(f"torch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions()
    return _through(F.linear_cross_entropy, options=options)(h)


def _peer(name: str) -> Callable[[Head], Run]:
    return lambda h: _through(peers.HEADS[name]())(h)


WAYS: dict[str, Callable[[Head], Run]] = {
    EAGER: _through(lambda x, w, t: F.cross_entropy(F.linear(x, w), t)),
    FORWARD: _through(M.linear_cross_entropy, grad_scale=1.0),
    BUFFER: _into_buffer,
    IMPERATIVE: _imperative,
    LOGITS: _through(_logits),
    CHUNKED: _chunked,
    **{name: _peer(name) for name in (CUT, LIGER, LIGER_FP32, QUACK)},
}


def _peak(run: Run, head: Head, device: str) -> float:
    """MiB of device memory above what is there, gradients included."""
    if device == "cpu":
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure(rows: int, columns: int, width: int, effort: Effort, device: str) -> list[Group]:
    """Times of all ways, and the peaks of memory of mbkern's that write into a buffer."""
    head = Head(rows, columns, width, device)
    head.buffer.zero_()
    entries: list[Entry] = []
    ways: list[Way] = []
    peaks: list[Entry] = []
    for name, make in WAYS.items():
        head.restore()
        try:
            run = make(head)
            error = head.error(*run())
            head.restore()
            peak = _peak(run, head, device)
        except Exception as failure:  # of a peer: the others go on
            if name.startswith("mbkern"):
                raise
            reason = str(failure) or type(failure).__name__
            entries.append(Entry(name, note=reason.splitlines()[0][:100]))
            continue
        entries.append(Entry(name, error=error, correct=error <= head.tolerance))
        peaks.append(Entry(name, [peak]))
        ways.append(Way(name, run, head.restore))
    head.restore()
    for name, logits in ((THREE, 1), (FOUR, 2)):
        entries.append(Entry(name))
        ways.append(Way(name, head.products(logits), head.restore))
    for timed in interleave(ways, effort, device):
        next(e for e in entries if e.name == timed.name).take(timed)
    label = f"bf16 ({rows}, {width}) x ({columns}, {width})"
    # What is returned is not counted: here the gradient of the hidden states alone is fresh.
    allowed = 1.2e9 / MIB + rows * width * 2 / MIB
    peaks.append(Entry(LIMIT_MIB, [allowed]))
    return [
        Group(SUITE, label, 1, device, "ms", THREE, entries, columns, "bfloat16"),
        Group(MEMORY, label, 1, device, "MiB", LIMIT_MIB, peaks, columns, "bfloat16"),
    ]
