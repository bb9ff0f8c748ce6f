"""The curve behind a plan, drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbkern._plan_result import Plan

NEEDS = "pictures need matplotlib: pip install matplotlib, or mbkern[plan]"


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG: throughput of function and gradient, and memory, over the micro-batch."""
    try:
        from matplotlib.figure import Figure  # not pyplot: the user's backend stays
    except ImportError as error:
        raise ImportError(f"mbkern: {NEEDS}") from error
    sizes = [probe.items for probe in plan.probes]
    picture = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory = picture.subplots(1, 2)
    for name, what, colour in (("gradient: forward and backward", "gradient_s", "#3c83de"),
                               ("function: forward alone", "function_s", "#858b94")):  # fmt: skip
        rates = [probe.items / getattr(probe, what) for probe in plan.probes]
        if what == "function_s" and plan.function_seconds is None:
            continue  # not measured
        speed.plot(sizes, rates, "o-", label=name, color=colour)
    speed.set(ylabel="items a second", title=f"{plan.device}: throughput")
    curve = plan.curve()
    mib = 2**20
    peaks = [(plan.held_bytes + probe.gradient_bytes) / mib for probe in plan.probes]
    memory.plot(sizes, peaks, "o", label="measured", color="#3c83de")
    expected = [(plan.held_bytes + curve.peak(n)) / mib for n in sizes]
    memory.plot(sizes, expected, "-", label="expected", color="#3c83de")
    memory.axhline(plan.held_bytes / mib, label="held before", color="#858b94", linestyle="--")
    if plan.limit_bytes < 4 * max(peaks) * mib:
        memory.axhline(plan.limit_bytes / mib, label="limit", color="#cf5a48", linestyle="--")
    memory.set(ylabel="MiB at the peak", title="memory")
    for axes in (speed, memory):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # the largest mark, whole
        axes.axvline(
            plan.micro_batch, label="taken", color="#149c77", linewidth=5, alpha=0.3, zorder=0
        )
        axes.set(xscale="log", xlabel="items in a micro-batch")
        axes.set_xticks(ticks := _apart(sizes, plan.micro_batch), [str(size) for size in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    picture.suptitle(_title(plan))
    picture.savefig(path, format="png", dpi=120)


def _title(plan: Plan) -> str:
    passes = f"{plan.passes} pass{'es' * (plan.passes != 1)}"
    tail = "" if plan.tail == plan.micro_batch else f", the last one of {plan.tail}"
    return f"a batch of {plan.batch_size} in {passes} of {plan.micro_batch}{tail}"


def _apart(sizes: Sequence[int], taken: int) -> list[int]:
    """The sizes that can be written below a logarithmic axis: the one that is taken, above all."""
    # There is room for about fifteen numbers.
    room = math.log(max(sizes) / min(sizes)) / 15
    written = [taken]
    for size in sizes:
        if all(abs(math.log(size / other)) > room for other in written):
            written.append(size)
    return sorted(written)
