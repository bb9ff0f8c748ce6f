"""Which micro-batch: measured on the user's machine and model, at a constant mini-batch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mbkern import _plan_memory
from mbkern._noise_scale import NoiseScale
from mbkern._plan_fit import SHARES, Curve, Probe, candidates, choose
from mbkern._plan_measure import Meter, Ranks, Source
from mbkern._plan_result import Instead, Plan, Verified

GAIN = 0.03  # two doublings that gain less an item are enough
LIMITED = 4  # sizes that are tried close to the limit
LONGER = 8  # passes at most in which the peak of the size that is taken is looked at again
ROUNDS = 25  # at most, in which all sizes are timed again
CONFIRM = 3  # rounds more before sizes are said to gain nothing


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
    step, so that the optimizer's state counts. Random numbers, and gradients of the parameters in
    the loss's graph, are put back; what else ``step`` changes (running statistics, a dropout
    counter of its own) is the caller's to undo.

    Args:
        step: called with a micro-batch, returns its loss, a 0-dim tensor; it runs with gradients,
            followed by a backward, and under ``torch.no_grad()``. If the loss does not require grad
            the step is taken to have run its own backward, and the function is not measured.
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
        seconds: about how long to measure, after the first two sizes.

    With ``torch.distributed`` initialised all processes must call it; each measures, the slowest
    and fullest counts, the smallest limit too, and all get the same plan. Run it under DDP's
    ``no_sync()``, or on ``ddp.module``.

    Returns:
        A :class:`Plan`; ``print`` it, ``micro_batches(batch, plan)``, ``to_json()``,
        ``save_png(path)``.

    Raises:
        ValueError: a batch below 1, an unknown objective, a noise scale or seconds that cannot be,
            ranks with different batches, all before anything is measured; a loss that is no 0-dim
            tensor.
        TypeError: a batch_size that is no integer, or another argument that is no number.
        MemoryError: one item does not fit; with the values.
        Whatever ``step`` raises, for one item as for two.
    """
    ranks, refused = Ranks(), None
    try:
        batch_size = _items(batch_size)
        _check_options(memory_limit, objective, seconds)
        noise = _Noise(noise_scale)
        source = Source(sample)
    except (TypeError, ValueError) as error:
        refused = error
    if ranks.most([float(refused is not None)])[0]:  # or the others would wait for this rank
        raise refused or ValueError("mbkern: another rank's arguments are refused")
    # No collective may depend on what only one rank knows: the others would wait for it.
    least, most, sharing = ranks.least(batch_size), -ranks.least(-batch_size), ranks.sharing()
    if least != most:
        raise ValueError(
            f"mbkern: batch_size is {batch_size} here, {least:g} to {most:g} elsewhere"
        )
    noise.agree(ranks)
    meter = Meter(step, source, ranks)
    with meter.undone():
        search = _Search(meter, batch_size, min(batch_size, source.most), seconds)
        search.start()
        limit = memory_limit
        if limit is None:
            limit = _plan_memory.default_limit(meter.device, sharing)
        search.room = int(ranks.least(float(limit - meter.held)))
        search.climb()
        verified = search.settle(SHARES[objective])
    return _result(search, verified, objective, noise)


def _items(batch_size: Any) -> int:
    items = operator.index(batch_size)
    if items < 1:
        raise ValueError(f"mbkern: batch_size is {items}; it must be at least 1")
    return items


def _check_options(memory_limit: Any, objective: str, seconds: Any) -> None:
    if objective not in SHARES:
        raise ValueError(f"mbkern: objective must be one of {', '.join(SHARES)}: {objective!r}")
    numbers = [(seconds, "seconds")]
    if memory_limit is not None:
        numbers.append((memory_limit, "memory_limit"))
    for value, name in numbers:
        if not 0 <= value < math.inf:
            raise ValueError(f"mbkern: {name} is {value}; it must be finite and at least 0")


class _Noise:
    """The noise scale that a plan was given.

    Attributes:
        scale: in items; None where it is not known.
        notes: why it is not, if one was given. Both as of all ranks, after ``agree``.
    """

    def __init__(self, given: Any) -> None:
        self.scale: float | None = None
        self.notes: list[str] = []
        self._estimate: float | None = None
        if given is None:
            return
        value = float(given.noise_scale if isinstance(given, NoiseScale) else given)
        if value > 0 and math.isfinite(value):
            self.scale = value
        elif isinstance(given, NoiseScale | Tensor) or math.isnan(value):
            self._estimate = value
        else:
            raise ValueError(f"mbkern: noise_scale is {value}; it must be positive and finite")

    def agree(self, ranks: Ranks) -> None:
        """Take the smallest that is known on any rank: each may have an estimate of its own."""
        estimate = math.nan if self._estimate is None else self._estimate
        known, least, unknown = (
            ranks.least(math.inf if value is None else value)
            for value in (
                self.scale,
                None if math.isnan(estimate) else estimate,
                None if self._estimate is None else 0.0,
            )
        )
        self.scale = known if math.isfinite(known) else None
        if self.scale is None and unknown == 0:
            shown = least if math.isfinite(least) else math.nan
            self.notes.append(f"the noise scale is not known yet: its estimate is {shown:.4g}")


class _Search:
    """The sizes that were measured, and the one that is taken."""

    def __init__(self, meter: Meter, batch: int, most: int, seconds: float) -> None:
        self.meter, self.batch, self.most, self.seconds = meter, batch, most, seconds
        self.room = 0
        self.probes: list[Probe] = []
        self.notes: list[str] = []
        self.taken, self.limited_by = 0, "the throughput's knee"

    @property
    def curve(self) -> Curve:
        return Curve(self.probes)

    def start(self) -> None:
        """Measure one item, or two where one is refused, as batch normalisation does."""
        try:
            self.meter.open(1)
            self.probes.append(self.meter.probe(1))
        except (ValueError, RuntimeError) as error:
            if self.most < 2:
                raise
            try:
                self.meter.open(2)
                self.probes.append(self.meter.probe(2))
            except (ValueError, RuntimeError):
                raise error from None
            self.notes.append(f"one item alone is refused by the step: {error}")

    def climb(self) -> None:
        """Measure larger sizes, while they gain, fit, and there is time."""
        first = self.probes[0]
        if first.gradient_bytes > self.room:
            held, limit = self.meter.held, self.meter.held + self.room
            raise MemoryError(
                f"mbkern: {first.items} item takes {_mib(first.gradient_bytes)} above the "
                f"{_mib(held)} that are held before, and the limit is {_mib(limit)}"
            )
        start, close = self.meter.spent, 0
        while self.probes[-1].items < self.most:
            last = self.probes[-1]
            following = self._fitting(min(2 * last.items, self.most))
            if following == last.items:
                break
            close += following < min(2 * last.items, self.most)
            late = self.meter.spent - start + 8 * 2 * last.gradient_s > self.seconds
            if close > LIMITED or (len(self.probes) > 1 and (late or self._saturated())):
                break
            self.probes.append(self.meter.probe(following))
            self._compare_sizes(last.items, following)
        left = self.seconds - (self.meter.spent - start)
        round_s = sum(probe.gradient_s for probe in self.probes) * 1.4
        for _ in range(min(ROUNDS, int(left / max(round_s, 1e-9)))):
            self.probes = [self.meter.again(probe) for probe in self.probes]

    def _fitting(self, wanted: int) -> int:
        """The largest size up to that which surely fits; at least the last one."""
        low, high = self.probes[-1].items, wanted
        while low < high:
            middle = (low + high + 1) // 2
            if self.curve.bound(middle) <= self.room:
                low = middle
            else:
                high = middle - 1
        return low

    def _saturated(self) -> bool:
        """Whether the last two doublings gained next to nothing; looked at twice."""
        for _ in range(2):
            if len(self.probes) < 4:
                return False
            rates = [probe.items / probe.gradient_s for probe in self.probes[-3:]]
            if max(rates[1:]) >= (1 + GAIN) * rates[0]:
                return False
            for _ in range(CONFIRM):
                self.probes[-3:] = [self.meter.again(probe) for probe in self.probes[-3:]]
        return True

    def _compare_sizes(self, small: int, large: int) -> None:
        a, b = (self.meter.size_of(n) / n for n in (small, large))
        if abs(a - b) > 0.05 * max(a, b) and not any("bytes each" in note for note in self.notes):
            self.notes.append(
                f"the sample's items differ in size ({a:.0f} bytes each of {small}, {b:.0f} of "
                f"{large}): the plan holds for such items only; give the longest"
            )

    def settle(self, share: float) -> Verified | None:
        """Choose, measure what was chosen, and choose again if that was a surprise."""
        verified = None
        for _ in range(3):
            largest = self.probes[-1].items
            most = self._fitting(min(2 * largest, self.most)) if largest < self.most else largest
            least = self.probes[0].items
            measured = [probe.items for probe in self.probes]
            sizes = candidates(self.batch, most, least, measured) or measured
            sizes = [n for n in sizes if self.curve.peak(n) <= self.room] or [measured[0]]
            self.taken = choose(self.curve, self.batch, sizes, share)
            if self.taken in measured:
                break
            before = self.curve
            verified = self._verify(before, self.meter.probe(self.taken))
            for _ in range(CONFIRM):
                self.probes = [self.meter.again(probe) for probe in self.probes]
        if self.taken not in [probe.items for probe in self.probes]:
            self.taken = choose(self.curve, self.batch, [p.items for p in self.probes], share)
        if verified is None and len(self.probes) > 1:
            found = next(probe for probe in self.probes if probe.items == self.taken)
            others = self.curve.without(self.taken)
            verified = self._verify(others, found)
        self._look_longer()
        if self.taken == self.batch:
            self.limited_by = "the batch: it fits whole"
        elif self.taken == self.most:
            self.limited_by = "the sample, which has no more items"
        elif 2 * self.taken <= self.most and self.curve.bound(2 * self.taken) > self.room:
            gained = self.curve.seconds(2 * self.taken) < 2 * share * self.curve.seconds(self.taken)
            self.limited_by = "the memory limit" if gained else self.limited_by
        return verified

    def _look_longer(self) -> None:
        """Measure the peak of what is taken over more passes, as a mini-batch has them."""
        found = next(probe for probe in self.probes if probe.items == self.taken)
        affordable = int(self.seconds / 4 / max(found.gradient_s, 1e-9))
        passes = min(LONGER, 2 * -(-self.batch // self.taken), affordable)
        longer = self.meter.window(found, passes)
        self.probes = [longer if probe is found else probe for probe in self.probes]

    def _verify(self, curve: Curve, found: Probe) -> Verified:
        if found.items not in [probe.items for probe in self.probes]:
            self.probes = sorted([*self.probes, found], key=lambda probe: probe.items)
        return Verified(
            found.items,
            curve.seconds(found.items),
            found.gradient_s,
            self.meter.held + int(curve.peak(found.items)),
            self.meter.held + int(found.gradient_bytes),
        )


def _result(search: _Search, verified: Verified | None, objective: str, noise: _Noise) -> Plan:
    curve, batch, size = search.curve, search.batch, search.taken
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
        objective=objective, limited_by=search.limited_by, seconds=seconds,
        function_seconds=None if math.isnan(function_s) else function_s,
        held_bytes=held, peak_bytes=held + int(curve.peak(size)),
        limit_bytes=held + search.room, overhead_s=overhead_s, item_s=item_s,
        fixed_bytes=int(fixed), item_bytes=item_bytes, device=str(search.meter.device),
        verified=verified, instead=instead, probes=search.probes,
        notes=search.notes + noise.notes,
    )  # fmt: skip


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
