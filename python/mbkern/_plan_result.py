"""What a plan says."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mbkern._plan_fit import Curve, Probe, progress
from mbkern._units import count, seconds, size


@dataclass(frozen=True)
class Verified:
    """A prediction made from other sizes, and what was measured then."""

    items: int
    predicted_s: float
    measured_s: float
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class Instead:
    """Two optimisation steps of half the batch, in place of one.

    Attributes:
        seconds: of their gradients; the second update of the parameters comes on top.
        noise_scale: the gradient noise scale in items, if known.
        progress: how far the two get against the one, at the best learning rates; at most 2.
        progress_a_second: the same in equal time.
    """

    seconds: float
    noise_scale: float | None = None
    progress: float | None = None
    progress_a_second: float | None = None

    @staticmethod
    def of(batch: int, one_s: float, two_s: float, noise_scale: float | None) -> Instead:
        """From the times of both."""
        if noise_scale is None:
            return Instead(two_s)
        gain = 2 * progress(batch / 2, noise_scale) / progress(batch, noise_scale)
        return Instead(two_s, noise_scale, gain, gain * one_s / two_s)


@dataclass(frozen=True)
class Plan:
    """How to cut a mini-batch, what it will take, and what that rests on.

    Attributes:
        micro_batch: items to compute at once.
        batch_size: items of the mini-batch.
        passes: micro-batches of a mini-batch.
        tail: items of the last one.
        objective: as asked for.
        limited_by: why it is no larger.
        seconds: of all gradient passes of a mini-batch.
        function_seconds: of the same in forward only; None where the step ran its own backward.
        held_bytes: before a pass: the process (CPU) or torch's allocator (CUDA), with gradients.
        peak_bytes: at the peak of a pass, what is held included.
        limit_bytes: for that.
        overhead_s, item_s: a gradient pass over n items takes about ``overhead_s + n * item_s``.
        fixed_bytes, item_bytes: and about ``fixed_bytes + n * item_bytes`` above what is held.
        device: that was measured.
        verified: a prediction, put to the test; None if one size was measured.
        instead: two steps of half the batch; None for a batch of one.
        probes: what was measured.
        notes: what to know.
    """

    micro_batch: int
    batch_size: int
    passes: int
    tail: int
    objective: str
    limited_by: str
    seconds: float
    function_seconds: float | None
    held_bytes: int
    peak_bytes: int
    limit_bytes: int
    overhead_s: float
    item_s: float
    fixed_bytes: int
    item_bytes: float
    device: str
    verified: Verified | None
    instead: Instead | None
    probes: list[Probe] = field(repr=False)
    notes: list[str]

    @property
    def items_a_second(self) -> float:
        """Throughput of the gradient."""
        return self.batch_size / self.seconds

    @property
    def gradient_cost(self) -> float | None:
        """How many times a forward pass a gradient pass takes."""
        return None if not self.function_seconds else self.seconds / self.function_seconds

    def to_json(self) -> str:
        """All of it; keys are the attributes' names."""
        values = asdict(self)
        values["items_a_second"] = self.items_a_second
        values["gradient_cost"] = self.gradient_cost
        for probe in values["probes"]:
            probe.update({k: None for k, v in probe.items() if math.isnan(v)})
        return json.dumps(values, indent=2, allow_nan=False)

    def save_png(self, path: str | Path) -> None:
        """Draw throughput and memory over the micro-batch. Needs matplotlib (``mbkern[plan]``)."""
        from mbkern._plan_picture import draw

        draw(self, Path(path))

    def curve(self) -> Curve:
        """Times and peaks of all sizes."""
        return Curve(self.probes)

    def __str__(self) -> str:
        tail = "" if self.tail == self.micro_batch else f", the last one of {self.tail}"
        lines = [
            f"micro-batch  {self.micro_batch}: a batch of {self.batch_size} in {self.passes} "
            f"pass{'es' * (self.passes != 1)}{tail}; no larger because of {self.limited_by}",
            f"expected     {seconds(self.seconds)} a batch, {count(self.items_a_second)} items/s; "
            f"at the peak {size(self.peak_bytes)} of {size(self.limit_bytes)}, with "
            f"the {size(self.held_bytes)} that are held before",
            f"model        a pass takes {seconds(self.overhead_s)} and {seconds(self.item_s)} an "
            f"item, {size(self.fixed_bytes)} and {size(self.item_bytes)} an item",
        ]
        if self.gradient_cost is not None:
            lines.append(
                f"gradient     takes {self.gradient_cost:.2f} times the function's time "
                "(forward and backward, against forward alone)"
            )
        if self.verified is not None:
            v = self.verified
            lines.append(
                f"verified     a pass of {v.items}: predicted {seconds(v.predicted_s)} and "
                f"{size(v.predicted_bytes)}, measured {seconds(v.measured_s)} and "
                f"{size(v.measured_bytes)}"
            )
        if self.instead is not None:
            lines.append(f"instead      {self._instead(self.instead)}")
        return "\n".join(lines + [f"note         {note}" for note in self.notes])

    def _instead(self, instead: Instead) -> str:
        small, odd = divmod(self.batch_size, 2)
        halves = f"{small + 1} and {small}" if odd else f"{small}"
        text = f"two steps of {halves}: {seconds(instead.seconds)} and one more update"
        if instead.progress is None or instead.progress_a_second is None:
            return text
        farther = "they get farther" if instead.progress_a_second > 1 else "one step gets farther"
        return (
            f"{text}; at a noise scale of {count(instead.noise_scale or 0.0)} items they make "
            f"{instead.progress:.2f} times the progress, {instead.progress_a_second:.2f} times in "
            f"the same time (updates not counted): {farther}"
        )
