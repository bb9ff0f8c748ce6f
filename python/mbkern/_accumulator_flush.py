"""From the sums of a window to the gradients of its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mbkern._accumulate import accumulate_
from mbkern._accumulator_collect import Measurement
from mbkern._accumulator_counts import reciprocal
from mbkern._accumulator_hooks import set_gradient
from mbkern._accumulator_parameters import Slot, lies_like
from mbkern._accumulator_rounding import low_parts
from mbkern._accumulator_sharded import Shards
from mbkern._arguments import Number
from mbkern._flush import FlushStats, flush_
from mbkern._noise_scale import NoiseScale, in_whole_items

INTO = ("grad", "fp32_grad", "main_grad")


@dataclass(frozen=True)
class WindowStats:
    """What a window came to. Tensors, which nobody waited for, where not said otherwise.

    Attributes:
        norm: 0-dim float64, of all gradients together, before clipping.
        clip_factor: 0-dim float64, what they were multiplied by.
        found_inf: 0-dim float32, 1 if one was not finite.
        penalty: 0-dim float64, the value of the regulariser.
        squared_norms: for each parameter that has a gradient (by name), before clipping.
        micro_batches: int.
        counts: for each denominator, what was counted: a float, or a float64 tensor.
        measurements: with ``measure=True``, the squared norms of every micro-batch's gradients,
            a GradScaler's scale divided out.
        sizes: by micro-batch, what it counted.
        sum_squared_norm: of the window's mean gradient, before clipping; None where a penalty is in
            it, in known mode, or where a micro-batch was not measured whole.
        repeated: whether a parameter had two gradients in one micro-batch.
        noise_scale: with ``noise_scale=True``, 0-dim float64: the estimate of the gradient noise
            scale over the windows so far, in items: the batch that is worth averaging.
        measured_whole: whether every gradient was measured: none was added by a kernel in known
            mode or between micro-batches, none was of a micro-batch that failed.
        clipped_share: with ``max_norm``, 0-dim float64: the share of the accumulator's finite
            windows so far that were clipped.
    """

    norm: Tensor
    clip_factor: Tensor
    found_inf: Tensor
    penalty: Tensor
    squared_norms: dict[str, Tensor]
    micro_batches: int
    counts: dict[str, Number]
    measurements: list[Measurement] = field(default_factory=list, repr=False)
    sizes: dict[int, Number] = field(default_factory=dict, repr=False)
    sum_squared_norm: Tensor | None = field(default=None, repr=False)
    repeated: bool = field(default=False, repr=False)
    noise_scale: Tensor | None = None
    measured_whole: bool = field(default=True, repr=False)
    clipped_share: Tensor | None = None

    @property
    def suggested_batch(self) -> Tensor | None:
        """The noise scale in whole items, at least 1; NaN while it is not known."""
        return None if self.noise_scale is None else in_whole_items(self.noise_scale)

    def update(self, noise_scale: NoiseScale) -> None:
        """Take this window into a running estimate of the gradient noise scale.

        Needs ``measure=True``, one denominator and no penalty. A window without micro-batches says
        nothing, nor does one with an overflow. Over several processes each rank sees its own
        micro-batches and the window of all: the estimates are each rank's own.
        """
        if self.micro_batches == 0:
            return
        if not self.measurements or len(self.counts) != 1 or self.sum_squared_norm is None:
            raise ValueError(
                "mbkern: the noise scale needs GradAccumulator(measure=True) with one denominator, "
                "without penalties, outside known mode, and every gradient measured: none added by "
                "a kernel between micro-batches, none of a micro-batch that failed, no two of one "
                "parameter at once"
            )
        (total,) = self.counts.values()
        sizes = [self.sizes[k] for k in range(self.micro_batches)]
        norms = [norm.square() for norm in self.micro_batch_norms()]
        noise_scale.update(norms, sizes, self.sum_squared_norm, total)

    def micro_batch_norms(self) -> list[Tensor]:
        """The norm of each micro-batch's summed gradient; needs ``measure=True``."""
        if self.repeated:
            raise RuntimeError(
                "mbkern: a parameter had two gradients in one micro-batch (two backwards, or a "
                "reentrant checkpoint); the norm of their sum was not measured"
            )
        if not self.measured_whole:
            raise RuntimeError(
                "mbkern: not every gradient of the window was measured: measure=True is missing, a "
                "kernel added some into a buffer (in known mode, or between micro-batches), or a "
                "micro-batch failed"
            )
        sums: dict[int, Tensor] = {}
        for m in self.measurements:
            part = m.squared_norms.sum()
            sums[m.micro_batch] = sums[m.micro_batch] + part if m.micro_batch in sums else part
        zero = self.norm.new_zeros(())
        return [sums.get(k, zero).sqrt() for k in range(self.micro_batches)]

    def non_finite(self) -> list[tuple[int, str]]:
        """(micro-batch, parameter) of every gradient with a NaN or an infinity.

        Waits for the device. Needs ``measure=True``; without it, and where only a sum overflows,
        the parameters of the sums are known, and the micro-batch is -1.
        """
        found = []
        for m in self.measurements:
            finite = m.squared_norms.isfinite().tolist()
            found += [
                (m.micro_batch, name)
                for name, good in zip(m.names, finite, strict=True)
                if not good
            ]
        if found or not self.squared_norms:
            return found
        # Not measured, or finite gradients whose sum is not.
        names = list(self.squared_norms)
        finite = torch.stack(list(self.squared_norms.values())).isfinite().tolist()
        return [(-1, name) for name, good in zip(names, finite, strict=True) if not good]


@dataclass(frozen=True)
class FlushOptions:
    """How sums become gradients.

    Attributes:
        into: one of ``INTO``.
        keep: the sums are still needed, so no gradient may lie in their memory.
        grad_scale: divided out.
        max_norm: None: not clipped.
        shards: of FSDP modules, whose sums are parts of their parameters.
    """

    into: str
    keep: bool
    grad_scale: Number
    max_norm: float | None
    shards: Shards | None = None


def fold(slots: list[Slot], totals: list[Number], keep: bool) -> dict[Slot, Tensor]:
    """The sums of all sets of buffers, each set divided by its own count; one buffer for each slot.

    With ``keep`` they are new memory, else the first set's own.
    """
    folded: dict[Slot, Tensor] = {}
    for which, total in enumerate(totals):
        members = [slot for slot in slots if slot.received[which]]
        factor = reciprocal(total)
        old = [slot for slot in members if slot in folded]
        new = [slot for slot in members if slot not in folded]
        add = [slot.buffers[which] for slot in old]
        accumulate_([folded[slot] for slot in old], add, factor)
        first = [slot.buffers[which] for slot in new]
        if which == 0 and not keep:
            to = first
            flush_(to, first, factor=factor)
        else:
            to = [torch.empty_like(b) if keep else b for b in (slot.buffers[0] for slot in new)]
            accumulate_(to, first, factor, 0.0)
        folded.update(zip(new, to, strict=True))
    return folded


def write(
    slots: list[Slot], totals: list[Number], options: FlushOptions
) -> tuple[FlushStats, dict[str, Tensor]]:
    """Give every parameter that has sums its gradient, the others None."""
    denominator: Number = 1.0
    low = None
    if len(totals) == 1:
        denominator = totals[0]
        sums = {slot: slot.buffers[0] for slot in slots if slot.received[0]}
        low = low_parts(sums, 0)
    else:
        folded = fold(slots, totals, options.keep)
        sums = {slot: folded[slot] for slot in slots if slot in folded}  # the order of the norm
    grads = [_target(slot, buffer, options) for slot, buffer in sums.items()]
    buffers = list(sums.values())
    shards = options.shards
    later = None if shards is None else options.max_norm
    stats = flush_(
        grads if later is None else buffers,
        buffers,
        denominator=denominator,
        grad_scale=options.grad_scale,
        factor=1.0 if shards is None else shards.divisor(),
        parameters=[s.local() if s.l1 or s.l2 else None for s in sums],
        l1=[slot.l1 for slot in sums],
        l2=[slot.l2 for slot in sums],
        max_norm=options.max_norm if later is None else None,
        compensation=low,
    )
    if shards is not None:
        stats = shards.whole(stats)
    if shards is not None and later is not None:  # the norm is known only now
        clip = torch.clamp(later / (stats.norm + 1e-6), max=1.0)
        over = shards.largest(flush_(grads, buffers, factor=clip).found_inf)
        stats = stats._replace(clip_factor=clip, found_inf=torch.maximum(stats.found_inf, over))
    for slot in slots:
        set_gradient(slot, None, options.into)
    prepare(list(sums), options.into)  # of another dtype now, perhaps
    for slot, grad in zip(sums, grads, strict=True):
        set_gradient(slot, grad, options.into)
    norms = {slot.name: stats.squared_norms[k] for k, slot in enumerate(sums)}
    return stats, norms


def _target(slot: Slot, buffer: Tensor, options: FlushOptions) -> Tensor:
    """The sums' own memory if that may hold the gradient, else new memory."""
    wanted = slot.parameter.dtype if options.into == "grad" else buffer.dtype
    needed = options.keep and buffer is slot.buffers[0]
    like = slot.local()
    with torch.inference_mode(False):  # the optimizer may write to it
        if wanted == buffer.dtype and not needed and lies_like(buffer, like):
            # Another object than the buffer: of .grad, module.to(...) exchanges the memory.
            return buffer.detach()
        return torch.empty_like(like, dtype=wanted)


def prepare(slots: list[Slot], into: str) -> None:
    """Let parameters take a gradient of another dtype, where that is asked for."""
    if into != "fp32_grad":
        return
    for slot in slots:
        wanted = slot.buffers[0].dtype
        if getattr(slot.parameter, "grad_dtype", slot.parameter.dtype) == wanted:
            continue
        if not hasattr(slot.parameter, "grad_dtype"):
            raise NotImplementedError(
                'mbkern: into="fp32_grad" needs Tensor.grad_dtype, which torch '
                f'{torch.__version__} lacks; use "main_grad" or "grad"'
            )
        slot.parameter.grad_dtype = wanted
