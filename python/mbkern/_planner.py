"""Which micro-batch: measured on the user's machine and model, at a constant mini-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mbkern import _plan_memory
from mbkern._noise_scale import NoiseScale
from mbkern._plan_measure import Meter, Ranks, Source
from mbkern._plan_options import Options
from mbkern._plan_result import Instead, Plan, Verified
from mbkern._plan_search import Search


def plan(
    step: Callable[[Any], Tensor],
    sample: Any,
    batch_size: int,
    *,
    memory_limit: int | None = None,
    objective: str = "throughput",
    noise_scale: float | Tensor | NoiseScale | None = None,
    seconds: float = 20.0,
) -> Plan:
    """Choose the micro-batch for a mini-batch of a given size, by measuring.

    The mini-batch, what is averaged into a gradient, stays as it is; chosen is how many items of it
    are computed at once. A few sizes are measured, from one item up: time and peak memory of the
    function (forward, no gradients) and of the gradient (forward and backward). Each next one is
    tried only if it surely fits, so memory never runs out unless a single item does not fit. Time
    and memory of other sizes follow; taken is the *knee*: the smallest micro-batch that reaches
    98.5 % of the best throughput (80 %: ``objective="memory"``) within the limit. ::

        def step(batch):
            logits = model(batch["ids"])
            return F.cross_entropy(logits, batch["labels"], reduction="sum")

        def sample(n):  # n of the longest items that there are
            return {"ids": torch.zeros(n, 512).long(), "labels": torch.zeros(n).long()}

        plan = mbkern.plan(step, sample, batch_size=512)
        print(plan)
        for batch in loader:  # of 512
            for part in mbkern.micro_batches(batch, plan):
                acc.backward(step(part), count=len(part["labels"]))
            acc.flush()
            optimizer.step()

    Call it when model and optimizer are as they will be in training, best after one optimisation
    step, so that the optimizer's state counts. Random numbers (of torch, NumPy and Python), and
    gradients of the parameters in the graphs of the losses, are put back; what else ``step``
    changes (running statistics, a dropout counter of its own, gradients of what a reentrant
    checkpoint hides from the graph) is the caller's to undo.

    Args:
        step: called with a micro-batch, returns its loss, a 0-dim tensor; it runs with gradients,
            followed by a backward, and under ``torch.no_grad()``. If the loss does not require grad
            the step is taken to have run its own backward, and the function is not measured. Every
            pass gets dicts and lists of its own, out of which it may take entries, and the same
            tensors, which it must leave as they are.
        sample: ``sample(n)`` returns a micro-batch of n items: the longest that occur, since time
            and memory are planned for them; of three draws the largest counts. Or a batch, with the
            longest items in it, of which the first ones are used (``mbkern.micro_batches``).
        batch_size: items of the mini-batch; with several processes, of this one's share.
        memory_limit: bytes that may be in use at the peak, *with all that is held before a pass*:
            of the process (CPU: resident memory) or of torch's allocator on the device. None: what
            is held now and nine tenths of what is free, divided among the processes of a machine.
        objective: "throughput" or "memory".
        noise_scale: the gradient noise scale in items, if known; then the plan also says whether
            two steps of half the batch would get farther. A number, or an estimate as a tensor or a
            ``mbkern.NoiseScale``: one that is NaN or not positive yet counts as not known.
        seconds: about how long to measure, after the first two sizes; of several ranks' the least.

    With ``torch.distributed`` initialised all processes must call it; each measures, the slowest
    and fullest counts, the smallest limit too, and all get the same plan. Run it under DDP's
    ``no_sync()``, or on ``ddp.module``.

    Returns:
        A :class:`Plan`; ``print`` it, ``micro_batches(batch, plan)``, ``to_json()``,
        ``save_png(path)``.

    Raises:
        ValueError: a batch below 1, an unknown objective, a noise scale or seconds that cannot be,
            a sample without items, ranks with different batches or objectives, all before anything
            is measured; a loss that is no 0-dim tensor.
        TypeError: a batch_size that is no integer, a step that is no function, or another argument
            that is no number.
        MemoryError: one item does not fit; with the values.
        Whatever ``step`` raises, for one item as for two; on other ranks a RuntimeError then.
    """
    ranks, refused = Ranks(), None
    try:
        options = Options(batch_size, memory_limit, objective, seconds, noise_scale)
        source = Source(sample)
        if not callable(step):
            raise TypeError(f"mbkern: step must be a function, not {type(step).__name__}")
    except Exception as error:
        refused = error
    if ranks.most([float(refused is not None)])[0]:  # or the others would wait for this rank
        raise refused or ValueError("mbkern: another rank's arguments are refused")
    # No collective may depend on what only one rank knows: the others would wait for it.
    options.agree(ranks)
    sharing, most = ranks.sharing(), int(ranks.least(float(min(options.batch, source.most))))
    meter = Meter(step, source, ranks)
    with meter.undone():
        search = Search(meter, options.batch, most, options.seconds)
        search.start()
        limit = options.limit
        if limit is None:
            limit = _plan_memory.default_limit(meter.device, sharing)
        search.room = int(ranks.least(float(limit - meter.held)))
        search.climb()
        verified = search.settle(options.share)
    return _result(search, verified, options)


def _result(search: Search, verified: Verified | None, options: Options) -> Plan:
    noise, curve = options.noise, search.curve
    batch, size = search.batch, search.taken
    held = search.meter.held
    seconds = curve.window(batch, size)
    halves = [batch - batch // 2, batch // 2]
    instead = None
    if halves[1]:
        twice_s = sum(curve.window(half, min(size, half)) for half in halves)
        instead = Instead.of(batch, seconds, twice_s, noise.scale)
    overhead_s, item_s = curve.time_line()
    fixed, item_bytes = curve.memory_line()
    function_s = curve.window(batch, size, "function_s")
    return Plan(
        micro_batch=size, batch_size=batch, passes=-(-batch // size), tail=batch % size or size,
        objective=options.objective, limited_by=search.limited_by, seconds=seconds,
        function_seconds=None if math.isnan(function_s) else function_s,
        held_bytes=held, peak_bytes=held + int(curve.peak(size)),
        limit_bytes=held + search.room, overhead_s=overhead_s, item_s=item_s,
        fixed_bytes=int(fixed), item_bytes=item_bytes, device=str(search.meter.device),
        verified=verified, instead=instead, probes=search.probes,
        notes=search.notes + noise.notes,
    )  # fmt: skip
