"""Which sizes are measured, and which of them is taken."""

from __future__ import annotations

from mbkern._plan_fit import Curve, Probe, candidates, choose
from mbkern._plan_measure import ElsewhereError, Meter
from mbkern._plan_result import Verified

GAIN = 0.03  # two doublings that gain less an item are enough
LIMITED = 4  # sizes that are tried close to the limit
LONGER = 8  # passes at most in which the peak of the size that is taken is looked at again
ROUNDS = 25  # at most, in which all sizes are timed again
KNEE = "the throughput's knee: larger ones gain little"
CONFIRM = 3  # rounds more before sizes are said to gain nothing


class Search:
    """The sizes that were measured, and the one that is taken."""

    def __init__(self, meter: Meter, batch: int, most: int, seconds: float) -> None:
        self.meter, self.batch, self.most, self.seconds = meter, batch, most, seconds
        self.room = 0
        self.probes: list[Probe] = []
        self.notes: list[str] = []
        self.taken, self.limited_by = 0, KNEE
        self.late = False

    @property
    def curve(self) -> Curve:
        return Curve(self.probes)

    def start(self) -> None:
        """Measure one item, or two where one is refused, as batch normalisation does."""
        try:
            self.meter.open(1)
            self.probes.append(self.meter.probe(1))
        except ElsewhereError:
            raise
        except (ValueError, RuntimeError) as error:
            if self.most < 2:
                raise
            try:
                self.meter.open(2)
                self.probes.append(self.meter.probe(2))
            except (ValueError, RuntimeError):
                raise error from None
            why = "" if self.meter.several else f": {error}"  # all ranks get the same plan
            self.notes.append(f"one item alone is refused by the step{why}")

    def climb(self) -> None:
        """Measure larger sizes, while they gain, fit, and there is time."""
        first = self.probes[0]
        if first.gradient_bytes > self.room:
            held, limit = self.meter.held, self.meter.held + self.room
            what = f"{first.items} items take" if first.items > 1 else "1 item takes"
            raise MemoryError(
                f"mbkern: {what} {_mib(first.gradient_bytes)} above the {_mib(held)} that are held "
                f"before, and the limit is {_mib(limit)}"
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
                self.late = late
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
        self._look_longer(share)
        self._explain(share)
        return verified

    def _look_longer(self, share: float) -> None:
        """Measure the peak of what is taken over more passes, as a mini-batch has them.

        What does not fit then gives place to a smaller size.
        """
        while True:
            found = next(probe for probe in self.probes if probe.items == self.taken)
            affordable = int(self.seconds / 4 / max(found.gradient_s, 1e-9))
            passes = min(LONGER, 2 * -(-self.batch // self.taken), affordable)
            longer = self.meter.window(found, passes)
            self.probes = [longer if probe is found else probe for probe in self.probes]
            if longer.gradient_bytes <= self.room:
                return
            measured = [probe.items for probe in self.probes if probe.items < self.taken]
            least = self.probes[0].items
            smaller = candidates(self.batch, self.taken - 1, least, measured)
            smaller = [n for n in smaller if n in measured and self.curve.peak(n) <= self.room]
            if not smaller:
                self.notes.append(
                    f"over {passes} passes {self.taken} took {_mib(longer.gradient_bytes)}, and "
                    f"there are {_mib(self.room)} above what is held: the limit may be exceeded"
                )
                return
            self.taken = choose(self.curve, self.batch, smaller, share)

    def _explain(self, share: float) -> None:
        """Say why no larger size was taken, and what the last micro-batch will meet."""
        tail, least = self.batch % self.taken, self.probes[0].items
        if 0 < tail < least:
            self.notes.append(f"the last micro-batch has {tail}, which the step refuses")
        if self.taken == self.batch:
            self.limited_by = "the batch: it fits whole"
        elif self.taken == self.most:
            self.limited_by = "the sample, which has no more items"
        else:
            following = min(2 * self.taken, self.most)
            known = following <= self.probes[-1].items
            peak = self.curve.peak(following) if known else self.curve.bound(following)
            if peak > self.room and self._gains(following, share):
                self.limited_by = "the memory limit"
            elif self.late and self._gains(self.most, share):
                self.limited_by = "the seconds to measure, which were over"
        if self.late and self.limited_by == KNEE and len(self.probes) < 4:
            self.notes.append(
                f"the seconds to measure were over after {self.probes[-1].items} of {self.most} "
                "items, too few to be sure of the knee: give more"
            )

    def _gains(self, items: int, share: float) -> bool:
        """Whether that size is expected to be so much faster that what is taken is not enough."""
        rates = [n / self.curve.seconds(n) for n in (self.taken, items)]
        return rates[0] < share * rates[1] or len(self.probes) == 1  # one size tells no rate

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


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
