"""What is to be reached, and whether it was measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from suites import accumulate, exact_sum, family, head, host, integration, memory, tiers, twin
from suites import cross_entropy as ce

from mbkern.bench.allocator import DEFAULT, RECYCLED
from mbkern.bench.formulas import ELEMENTS, ROWS
from mbkern.bench.results import Group, paired_ratio
from mbkern.bench.statistics import summarise

Where = Callable[[Group], bool]

SLACK_MIB = 0.5  # the kernel counts resident pages in batches


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio of two entries of a group (or, in bytes, on their difference).

    Attributes:
        what: what it is called.
        suite: which groups it is about ...
        where: ... and which of those.
        numerator, denominator: names of the entries.
        bound: at least this if ``at_least``, else at most.
        difference: compare numerator - denominator, in this unit, instead of the ratio.
    """

    what: str
    suite: str
    numerator: str
    denominator: str
    bound: float
    where: Where
    at_least: bool = True
    difference: str = ""

    @property
    def reach(self) -> str:
        unit = f" {self.difference}" if self.difference else "x"
        return f"{'>=' if self.at_least else '<='} {self.bound:g}{unit}"


@dataclass(frozen=True)
class Verdict:
    """A goal at one place. ``passed`` is None where nothing was measured."""

    goal: Goal
    group: Group
    measured: str
    passed: bool | None
    close: bool = False  # the bound lies within the interval of the measurement
    minima: str = "-"  # the ratio of the fastest samples: the better guide on a busy machine

    @property
    def text(self) -> str:
        if self.passed is None:
            return "not measured"
        return ("pass" if self.passed else "FAIL") + (" (within noise)" if self.close else "")


def _fp32(state: str, *columns: int) -> Where:
    return lambda g: g.dtype == "float32" and g.allocator == state and g.columns in columns


def _against_torch() -> list[Goal]:
    """Speed against torch: times of torch over times of mbkern."""
    long = (32000, 128256)
    table = [
        ("fp32 in place, V >= 32000", ce.IN_PLACE, ce.TORCH, long, 3.5, 12.0),
        ("fp32 autograd, V >= 32000", ce.AUTOGRAD, ce.TORCH, long, 2.5, 6.0),
        ("fp32 in place, V = 1000", ce.IN_PLACE, ce.TORCH, (1000,), 3.0, 4.0),
        ("fp32 autograd, V = 1000", ce.AUTOGRAD, ce.TORCH, (1000,), 2.0, 2.5),
        ("fp32 autograd against torch.compile", ce.AUTOGRAD, ce.COMPILED, long, 1.8, 3.0),
        ("(8, 21, 512, 512) in place", ce.IN_PLACE, ce.TORCH, (21,), 1.0, 1.0),
        ("(8, 21, 512, 512) autograd", ce.AUTOGRAD, ce.TORCH, (21,), 1.0, 1.0),
    ]
    goals = []
    for what, ours, theirs, columns, recycled, default in table:
        for state, bound in ((RECYCLED, recycled), (DEFAULT, default)):
            goals.append(Goal(what, ce.SUITE, theirs, ours, bound, _fp32(state, *columns)))
    for what, ours, bound in (("in place", ce.IN_PLACE, 3.0), ("autograd", ce.AUTOGRAD, 2.0)):
        goals.append(
            Goal(
                f"bf16 {what}, V >= 32000", ce.SUITE, ce.TORCH, ours, bound,
                lambda g: g.dtype == "bfloat16" and g.allocator == DEFAULT,
            )
        )  # fmt: skip
    return goals


def _against_the_machine() -> list[Goal]:
    """Upper bounds on time, price and memory."""

    def limit(long: bool) -> Where:
        return lambda g: (
            g.dtype == "float32"
            and g.threads == 1
            and (g.columns >= 32000 if long else g.columns == 1000)
        )

    goals = [
        Goal("in place / bare exp, V >= 32000", ce.SUITE, ce.IN_PLACE, ce.LIMIT, 1.8, limit(True),
             at_least=False),
        Goal("in place / bare exp, V = 1000", ce.SUITE, ce.IN_PLACE, ce.LIMIT, 2.5, limit(False),
             at_least=False),
        Goal("AVX2 / AVX-512, in place", tiers.SUITE, "avx2", "avx512", 1.6, lambda g: True,
             at_least=False),
        Goal("host time, forward + backward", host.SUITE, host.MBKERN, host.TORCH, 1.0,
             lambda g: "cross_entropy" in g.case and g.case.endswith(host.BOTH), at_least=False),
        Goal("exact sum: share of streaming speed", exact_sum.SUITE, exact_sum.PLAIN,
             exact_sum.EXACT, 0.85, lambda g: "from memory" in g.case),
        Goal("reproducible / plain, V >= 4096", twin.SUITE, twin.CANONICAL, twin.PLAIN, 1.05,
             lambda g: g.columns >= 4096 or not g.columns, at_least=False),
    ]  # fmt: skip
    goals += [
        Goal(f"memory above the promise, {way}", memory.SUITE, way, memory.PROMISED + way,
             SLACK_MIB, lambda g: True, at_least=False, difference="MiB")
        for way in (ce.IN_PLACE, ce.AUTOGRAD)
    ]  # fmt: skip
    return goals


def _through_torch() -> list[Goal]:
    """Upper bounds on the detours of the suite integration."""

    def at(case: str) -> Where:
        return lambda g: g.case.startswith(case)

    i = integration
    return [
        Goal("compiled / eager, (512, 32000)", i.SUITE, i.COMPILED, i.EAGER, 1.05, at("compiled"),
             at_least=False),
        Goal("the same, less what compiling adds to a sum over the logits", i.SUITE, i.LESS,
             i.EAGER, 1.05, at("compiled"), at_least=False),
        Goal("patched(), intercepted call", i.SUITE, i.PATCHED, i.DIRECT, 3.0, at(i.INTERCEPTED),
             at_least=False, difference="us"),
        Goal("patched(), other call", i.SUITE, i.PATCHED, i.OUTSIDE, 0.1, at(i.OTHER),
             at_least=False, difference="us"),
        Goal("patched(mode=True), other call", i.SUITE, i.MODE, i.OUTSIDE, 3.5, at(i.OTHER),
             at_least=False, difference="us"),
    ]  # fmt: skip


def _of_the_family() -> list[Goal]:
    simple = ("mse_loss", "huber_loss")
    # One pass in torch, without exponentials; the others are chains of passes, or need them.
    passes = (*simple, "l1_loss", "smooth_l1_loss")
    exponential = {formula.name for formula in (*ELEMENTS, *ROWS) if formula.exponential}

    def name(group: Group) -> str:
        return group.case.split()[0]

    def of(dtype: str, names: Collection[str], inside: bool = True) -> Where:
        return lambda g: g.dtype == dtype and (name(g) in names) is inside

    def there(state: str, where: Where = lambda _: True) -> Where:
        return lambda g: g.allocator == state and where(g)

    def compiled(group: Group) -> bool:
        return group.allocator == DEFAULT and group.entry(family.COMPILED) is not None

    elements, rows = family.ELEMENTS, family.ROWS
    torch, ours, in_place = family.TORCH, family.AUTOGRAD, family.IN_PLACE
    goals = []
    for state, least in ((RECYCLED, 2.5), (DEFAULT, 4.0)):
        what = f"{state} allocator"
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            goals += [
                Goal(f"mse, huber {short}, {what}", elements, torch, ours, least,
                     there(state, of(dtype, simple))),
                Goal(f"with exp, log or a chain {short}, {what}", elements, torch, ours, 4.0,
                     there(state, of(dtype, passes, False))),
            ]  # fmt: skip
        goals += [
            Goal(f"losses of rows, {what}", rows, torch, ours, least, there(state)),
            Goal(f"KL of (1024, 32000) pairs, {what}", rows, torch, ours, 4.0,
                 there(state, of("float32", ("kl_div_with_logits",)))),
        ]  # fmt: skip
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        goals += [
            Goal(f"in place without exp {short}, to a bare pass", elements, in_place, family.LIMIT,
                 1.25, of(dtype, exponential, False), at_least=False),
            Goal(f"in place with exp {short}, to a bare pass", elements, in_place, family.LIMIT,
                 1.8, of(dtype, exponential), at_least=False),
        ]  # fmt: skip
    return [
        *goals,
        Goal("against torch.compile", elements, family.COMPILED, ours, 1.5, compiled),
        Goal("host time at 2^12", "host-family", ours, torch, 1.0, lambda _: True, at_least=False),
    ]


def _of_the_head() -> list[Goal]:
    def of(dtype: str) -> Where:
        return lambda g: g.dtype == dtype

    def everywhere(_: Group) -> bool:
        return True

    h, fp32, bf16 = head, of("float32"), of("bfloat16")
    at_most = [
        ("head fp32, formed in forward, to three products", h.FORWARD, h.THREE, 1.05, fp32),
        ("head fp32, imperative, to three products", h.IMPERATIVE, h.THREE, 1.05, fp32),
        ("head fp32, into a buffer, to four products", h.BACKWARD, h.FOUR, 1.05, fp32),
        ("head bf16, formed in forward, to three products", h.FORWARD, h.THREE, 1.3, bf16),
        ("head bf16, imperative, to three products", h.IMPERATIVE, h.THREE, 1.3, bf16),
        ("head fp32, split-invariant / fast, way 2", h.SPLIT_BACKWARD, h.BACKWARD, 1.2, fp32),
        ("head fp32, split-invariant / fast, way 3", h.SPLIT_IMPERATIVE, h.IMPERATIVE, 1.2, fp32),
        ("head fp32, split-invariant on AVX2 / fast", h.AVX2, h.IMPERATIVE, 1.8, fp32),
        (
            "head fp32, split-invariant / fast, way 2, both on AVX2",
            h.AVX2_BACKWARD,
            h.AVX2_BACKWARD_FAST,
            1.8,
            fp32,
        ),
        ("head fp32, split-invariant / fast, way 3, both on AVX2", h.AVX2, h.AVX2_FAST, 1.8, fp32),
    ]
    return [
        *(Goal(what, h.SUITE, a, b, bound, where, at_least=False)
          for what, a, b, bound, where in at_most),
        Goal("head against torch's chunked one", h.SUITE, h.CHUNKED, h.FORWARD, 3.0, everywhere),
        Goal("head against torch unfused", h.SUITE, h.UNFUSED, h.FORWARD, 1.0, everywhere),
        Goal("memory of the head, imperative, to torch's", h.MEMORY, h.IMPERATIVE, h.UNFUSED, 0.1,
             everywhere, at_least=False),
    ]  # fmt: skip


def _of_accumulation() -> list[Goal]:
    a = accumulate

    def at(case: str, threads: int | None = None) -> Where:
        return lambda g: g.case.startswith(case) and threads in (None, g.threads)

    small, mixed = (f"fp32, {a.COUNT} tensors of {n[0]} to {n[1]}" for n in (a.SMALL, a.MIXED))
    goals = [
        Goal("accumulate bf16, share of x *= c", a.SUITE, a.RMW, a.MBKERN, 0.90,
             lambda g: at("bf16")(g) and g.case.endswith("elements")),
        Goal("accumulate fp32, share of x *= c", a.SUITE, a.RMW, a.MBKERN, 0.85,
             lambda g: at("fp32")(g) and g.case.endswith("elements")),
        Goal("norm and finiteness, from memory", a.SUITE, a.MEASURED, a.MBKERN, 1.03,
             lambda g: g.case.endswith("elements") and "flush" not in g.case, at_least=False),
        Goal(f"accumulate fp32, {a.COUNT} tensors", a.SUITE, a.TORCH, a.MBKERN, 1.3,
             at(f"fp32 -> {mixed}")),
        Goal("flush", a.SUITE, a.TORCH, a.MBKERN, 3.0, at("flush")),
    ]  # fmt: skip
    for theirs in (a.TORCH, a.CAST):
        for threads, bound in ((1, 2.0), (2, 2.5)):
            goals.append(Goal(f"accumulate bf16, {a.COUNT} tensors, {theirs}", a.SUITE, theirs,
                              a.MBKERN, bound, at(f"bf16 -> {mixed}", threads)))  # fmt: skip
        goals.append(Goal(f"accumulate bf16, {a.COUNT} small tensors, {theirs}", a.SUITE, theirs,
                          a.MBKERN, 4.0, at(f"bf16 -> {small}")))  # fmt: skip
    return goals


GOALS = (
    *_against_torch(),
    *_against_the_machine(),
    *_through_torch(),
    *_of_the_family(),
    *_of_accumulation(),
    *_of_the_head(),
)


def judge(groups: Sequence[Group], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Every goal at every place that it speaks of."""
    return [
        _judge(goal, group)
        for goal in goals
        for group in groups
        if group.suite == goal.suite and goal.where(group)
    ]


def _judge(goal: Goal, group: Group) -> Verdict:
    if goal.difference:
        above, below = group.entry(goal.numerator), group.entry(goal.denominator)
        if above is None or below is None or not (above.samples and below.samples):
            return Verdict(goal, group, "-", None)
        if not (above.ranked and below.ranked):
            return _unranked(goal, group)
        value = summarise(above.samples).median - summarise(below.samples).median
        return Verdict(goal, group, f"{value:+.2f} {goal.difference}", value <= goal.bound)
    ratio = paired_ratio(group, goal.numerator, goal.denominator)
    if ratio is None:
        return _unranked(goal, group)
    passed = ratio.median >= goal.bound if goal.at_least else ratio.median <= goal.bound
    measured = f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"
    close = ratio.low <= goal.bound <= ratio.high
    return Verdict(goal, group, measured, passed, close, f"{ratio.of_minima:.2f}x")


def _unranked(goal: Goal, group: Group) -> Verdict:
    """Of an entry that was not measured, is wrong, or has raised."""
    for name in (goal.numerator, goal.denominator):
        entry = group.entry(name)
        if entry is not None and not entry.ranked:
            what = "has failed" if entry.correct else "is wrong"
            return Verdict(goal, group, f"{entry.name} {what}", False)
    return Verdict(goal, group, "-", None)
