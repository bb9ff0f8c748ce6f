"""Gradients on their way from autograd to the buffers."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from mbkern._accumulate import accumulate_
from mbkern._accumulator_apart import Apart
from mbkern._accumulator_parameters import Slot
from mbkern._accumulator_rounding import Rounding
from mbkern._arguments import Number

BUCKET_BYTES = 16 << 20


@dataclass(frozen=True)
class Measurement:
    """Squared norms of the gradients that one launch added; None where a gradient was scaled."""

    micro_batch: int
    names: list[str]
    squared_norms: Tensor


class Collector:
    """Adds the gradients of one micro-batch, in buckets, and frees them.

    Args:
        which: the set of buffers.
        alpha: multiplies every gradient as it is added.
        micro_batch: its number in the window.
        pre_scale: what the gradients were multiplied by, for their norms.
        measure: whether to keep the gradients' squared norms.
        densify: whether a sparse gradient is made dense, instead of refused.
        rounding: of bfloat16 buffers.
    """

    def __init__(
        self,
        which: int,
        alpha: Number,
        micro_batch: int,
        *,
        pre_scale: float,
        measure: bool,
        densify: bool,
        rounding: Rounding,
    ) -> None:
        self.which, self.alpha, self.micro_batch = which, alpha, micro_batch
        self.pre_scale, self.measure, self.densify = pre_scale, measure, densify
        self.rounding = rounding
        self.added = 0  # gradients
        self.repeated = False  # whether a parameter had two: their norms are not that of the sum
        self._seen: set[int] = set()
        self.measurements: list[Measurement] = []
        self._bucket: dict[int, tuple[Slot, Tensor]] = {}
        self._bytes = 0
        self._stream: torch.cuda.Stream | None = None  # whose work the bucket's gradients are
        self._lock = threading.Lock()  # autograd has a thread for each device

    def take(self, slot: Slot) -> None:
        """Take over the gradient that autograd has just put into ``.grad``."""
        grad = slot.parameter.grad
        if grad is None and slot.lent:  # a kernel has added it into the buffer itself
            return
        if grad is None:
            raise RuntimeError(
                f"mbkern: the gradient of {slot.name} went elsewhere before it came here: two "
                "accumulators at work on one parameter, or a kernel that adds into a buffer of its "
                "own (pass it GradAccumulator.buffer(parameter))"
            )
        slot.parameter.grad = None
        grad = slot.local(grad)
        if getattr(slot.parameter, "grad_added_to_main_grad", False):
            raise RuntimeError(
                f"mbkern: the gradient of {slot.name} was added to its main_grad, not to this "
                "accumulator: pass accumulate_into=GradAccumulator.buffer(parameter)"
            )
        if grad.layout is not torch.strided:
            if not self.densify:
                raise TypeError(
                    f"mbkern: the gradient of {slot.name} has layout {grad.layout}; use a layer "
                    'with dense gradients (sparse=False), or GradAccumulator(sparse="densify")'
                )
            grad = grad.to_dense()
        grad = grad.detach()
        size = grad.numel() * grad.element_size()
        stream = _stream_of(grad)
        with self._lock:
            twice = id(slot) in self._bucket  # two backwards in one micro-batch
            self.repeated |= id(slot) in self._seen
            self._seen.add(id(slot))
            if twice or self._bytes + size > BUCKET_BYTES or stream != self._stream:
                self._empty()
            self._stream = stream
            self._bucket[id(slot)] = (slot, grad)
            self._bytes += size
            if self._bytes >= BUCKET_BYTES:
                self._empty()

    def finish(self) -> None:
        """Add what is left."""
        with self._lock:
            self._empty()

    def take_apart(self, apart: Apart) -> None:
        """Add and measure what kernels have added apart."""
        slots, squares = apart.take(measure=True)
        if squares is None:
            return
        self.measurements.append(
            Measurement(self.micro_batch, [slot.name for slot in slots], squares)
        )
        for slot in slots:
            self.repeated |= id(slot) in self._seen
            self._seen.add(id(slot))
        self.added += len(slots)

    def drop(self) -> None:
        """Forget what has not been added."""
        with self._lock:
            self._bucket.clear()
            self._bytes = 0

    def _empty(self) -> None:
        """One launch for each device, and for buffers that are written or added to."""
        launches: dict[tuple[torch.device, bool], list[tuple[Slot, Tensor]]] = {}
        for slot, grad in self._bucket.values():
            self._bring_here(grad)
            launches.setdefault((grad.device, slot.received[self.which]), []).append((slot, grad))
        self._bucket.clear()
        self._bytes = 0
        for (_, received), members in launches.items():
            buffers = [slot.buffers[self.which] for slot, _ in members]
            grads = [grad for _, grad in members]
            beta = 1.0 if received else 0.0
            more = self.rounding.arguments([slot for slot, _ in members], self.which)
            if self.measure:
                found = accumulate_(buffers, grads, self.alpha, beta, measure=True, **more)
                names = [slot.name for slot, _ in members]
                squares = found.squared_norms / self.pre_scale**2
                self.measurements.append(Measurement(self.micro_batch, names, squares))
            else:
                accumulate_(buffers, grads, self.alpha, beta, **more)
            for slot, _ in members:
                slot.received[self.which] = True
            self.added += len(members)

    def _bring_here(self, grad: Tensor) -> None:
        """Let the current stream read a gradient that is another's work, and whose memory is the
        other's again as soon as nobody holds it: autograd runs a hook on the stream on which the
        parameter was first used, and a micro-batch may end on a third."""
        here = _stream_of(grad)
        if here is not None and self._stream is not None and here != self._stream:
            here.wait_stream(self._stream)
            grad.record_stream(here)


def _stream_of(grad: Tensor) -> torch.cuda.Stream | None:
    """The stream that torch would now use for a gradient; None on the CPU."""
    return torch.cuda.current_stream(grad.device) if grad.is_cuda else None
