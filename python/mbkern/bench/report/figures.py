"""What is drawn, before it is drawn: points with intervals, for both the page and the pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mbkern.bench import conclusions, statistics
from mbkern.bench.display import speedup
from mbkern.bench.report.colours import colours
from mbkern.bench.rows import Row, grouped


@dataclass
class Line:
    """Points of one provider; ``x`` may be labels. ``low`` and ``high`` are ends of intervals.

    ``name`` may say more than the provider, which is what it starts as.
    """

    name: str
    x: list[float] | list[str]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    limit: bool = False
    mark: float | None = None  # an x that is pointed out
    colour: str = ""
    dotted: bool = False
    provider: str = ""

    def __post_init__(self) -> None:
        self.provider = self.provider or self.name


@dataclass
class Panel:
    """More lines over the same x, below the others, with a linear y."""

    y: str
    lines: list[Line]

    @property
    def marks(self) -> list[int]:
        """Sizes of the lines' marks: the first are the largest, as others may lie on top."""
        return [4 + 3 * k for k in reversed(range(len(self.lines)))]


@dataclass
class Figure:
    """One picture.

    Attributes:
        key: part of its file name.
        title, x, y: in words, with units.
        lines: what is drawn.
        kind: "line", "points" (x are values, y are labels in ``Line.x``) or "bars".
        reference: a value that is drawn across: of y, or of x for points.
        note: what to see.
        panels: below, of a "line" figure.
    """

    key: str
    title: str
    x: str
    y: str
    lines: list[Line]
    kind: str = "line"
    reference: float | None = None
    note: str = ""
    panels: list[Panel] = field(default_factory=list)


def all_of(rows: Sequence[Row]) -> list[Figure]:
    """Every picture that these rows have points for."""
    figures = [*_minibatch(rows), *_scaling(rows)]
    for suite in dict.fromkeys(r.suite for r in rows):
        if suite in ("minibatch", "scaling"):
            continue
        mine = [r for r in rows if r.suite == suite]
        figures += [*_speedups(suite, mine), *_sizes(suite, mine), *_roofline(suite, mine),
                    *_memory(suite, mine)]  # fmt: skip
    chosen = colours((r.provider, r.limit) for r in rows)
    taken: set[str] = set()
    for figure in figures:
        figure.key = _file_name(figure.key, taken)
        for line in (*figure.lines, *(line for panel in figure.panels for line in panel.lines)):
            line.colour = chosen[line.provider, line.limit]
    return figures


def _file_name(key: str, taken: set[str]) -> str:
    """The key as a file's name that no other figure has: a suite may be called anything."""
    name = re.sub(r"[^\w.-]+", "_", key)
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _place(row: Row) -> str:
    return f"{row.allocator} allocator{row.unusual}, {_threads(str(row.threads))}"


def _threads(count: str) -> str:
    return "1 thread" if count == "1" else f"{count} threads"


_KNEE = "Marked is the knee: the smallest micro-batch within 10 % of the best time."


def _minibatch(rows: Sequence[Row]) -> list[Figure]:
    """Function and gradient of one loss together, and below what cutting costs in exactness."""
    found: dict[str, list[conclusions.Series]] = {}
    for s in conclusions.series(rows, "minibatch"):
        loss = s.name.rpartition(" ")[0]
        title = f"{loss}, {_state(s)}, {_threads(s.threads)}"
        found.setdefault(title, []).append(s)
    return [
        Figure(
            f"minibatch-{k}", f"Time a sample: {title}", "micro-batch [samples]",
            "time a sample [s]", [_time_a_sample(s) for s in members],
            note=" ".join([_KNEE, *_cut_note(members)]), panels=_cut_panels(members),
        )
        for k, (title, members) in enumerate(found.items())
    ]  # fmt: skip


def _state(s: conclusions.Series) -> str:
    return f"{s.allocator} allocator{s.rows[0].unusual}"


def _time_a_sample(s: conclusions.Series) -> Line:
    what = s.name.rpartition(" ")[2]
    line = _line_over_size(s.provider, s.rows, lambda row: row.size)
    line.name += f" · {what}"
    line.mark, line.dotted = s.knee, what == "function"
    return line


def _cut(s: conclusions.Series) -> list[Row]:
    return [row for row in s.rows if "bits_different" in row.extra]


def _cut_panels(found: Sequence[conclusions.Series]) -> list[Panel]:
    panels = []
    for name, label in (("bits_different", "results that differ"), ("loss_error", "loss error")):
        lines = [
            Line(s.provider, [r.size for r in cut], [float(r.extra[name]) for r in cut])
            for s in found
            if (cut := _cut(s))
        ]
        if lines:
            panels.append(Panel(label, lines))
    return panels


def _cut_note(found: Sequence[conclusions.Series]) -> list[str]:
    rows = [row for s in found for row in s.rows]
    items = max((r.extra.get("cut_items", 0) for r in rows), default=0)
    below = (
        f"Below: {items} samples cut into such micro-batches; elements of the gradient (and the "
        "loss) whose bits are not those of the uncut samples, and the relative error of the mean "
        "loss against fp64."
    )
    return [*([below] if items else []), *conclusions.notes(rows)]


def _line_over_size(
    name: str, rows: Sequence[Row], by: Callable[[Row], float] = lambda _: 1.0
) -> Line:
    """Median times over sizes, with intervals, divided by what ``by`` says."""
    ordered = sorted(rows, key=lambda r: r.size)
    ends = [r.interval_s or [r.median_s or 0.0] * 2 for r in ordered]
    return Line(
        name, [r.size for r in ordered], [(r.median_s or 0.0) / by(r) for r in ordered],
        [low / by(r) for (low, _), r in zip(ends, ordered, strict=True)],
        [high / by(r) for (_, high), r in zip(ends, ordered, strict=True)], ordered[0].limit,
    )  # fmt: skip


def _scaling(rows: Sequence[Row]) -> list[Figure]:
    found: dict[tuple[str, str], list[Line]] = {}
    for s in conclusions.series(rows, "scaling"):
        line = _line_over_size(s.provider, s.rows)
        growth = statistics.growth(s.sizes, [r.samples_s for r in s.rows])
        if growth:
            line.name += f" · slope {growth.slope:.2f}"
        title = f"Growth: {s.name}, {_state(s)}" + f", {_threads(s.threads)}" * bool(s.threads)
        found.setdefault((title, s.rows[0].axis), []).append(line)
    return [
        Figure(f"scaling-{k}", title, axis, "time [s]", lines,
               note="Expected is a slope of 1, of -1 for threads.")
        for k, ((title, axis), lines) in enumerate(found.items())
    ]  # fmt: skip


def _timed(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows with a number, by where they were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.ranked and row.median_s:
            found.setdefault(_place(row), []).append(row)
    return found


def _pass(row: Row) -> str:
    return "forward and backward" if row.direction == "both" else row.direction


def _label(row: Row) -> str:
    direction = "" if row.direction == "both" else f" {row.direction}"
    return f"{row.case} {row.dtype}{direction}"


_FASTER = "Right of the line at 1 is faster. With 95 % intervals of the ratio."


def _speedups(suite: str, rows: Sequence[Row]) -> list[Figure]:
    figures: list[Figure] = []
    for place, timed in _timed(rows).items():
        lines: dict[str, Line] = {}
        baselines: dict[str, None] = {}
        for group in grouped(timed).values():
            base = next((r for r in group if r.provider == r.baseline), None)
            for row in group:
                ratio = speedup(row, base)
                if ratio is None or row.limit:
                    continue
                baselines[row.baseline] = None
                line = lines.setdefault(row.provider, Line(row.provider, [], []))
                line.x = [*map(str, line.x), _label(row)]
                line.y.append(ratio.median)
                line.low.append(ratio.low)
                line.high.append(ratio.high)
        if lines:
            title = f"Speed-up over {' or '.join(baselines)}: {suite}, {place}"
            figures.append(
                Figure(f"speedup-{suite}-{len(figures)}", title, "times faster", "",
                       list(lines.values()), "points", 1.0, _FASTER)
            )  # fmt: skip
    return figures


_LOWER = "Lower is better. With 95 % intervals of the median."


def _sizes(suite: str, rows: Sequence[Row]) -> list[Figure]:
    """Time an element over the number of classes, where a provider has at least three."""
    figures: list[Figure] = []
    for place, timed in _timed(rows).items():
        found: dict[str, dict[str, list[Row]]] = {}
        for row in timed:
            what = f"{row.dtype} {_pass(row)}, over {row.axis}"
            found.setdefault(what, {}).setdefault(row.provider, []).append(row)
        for what, providers in found.items():
            lines = [
                _line_over_size(name, members, lambda row: float(math.prod(row.shape)))
                for name, members in providers.items()
                if len({r.size for r in members}) >= 3
            ]
            if lines and suite == "cross_entropy":
                title = f"Time against size: {suite} {what}, {place}"
                axis = next(iter(providers.values()))[0].axis
                key = f"size-{suite}-{len(figures)}"
                figures.append(Figure(key, title, axis, "time an element [s]", lines, note=_LOWER))
    return figures


_LIMITS_NOTE = (
    "Higher is better. Limits are no providers: a bare pass over the same memory, or the bare "
    "products, measured beside them."
)


def _roofline(suite: str, rows: Sequence[Row]) -> list[Figure]:
    """How fast bytes move, or products are made, beside what the machine does at best."""
    figures: list[Figure] = []
    for place, timed in _timed(rows).items():
        for what, unit, scale in (("bytes", "GB/s", 1e9), ("flops", "TFLOP/s", 1e12)):
            lines: dict[str, Line] = {}
            for row in timed:
                amount = getattr(row, what)
                if amount and row.median_s:
                    line = lines.setdefault(row.provider, Line(row.provider, [], []))
                    line.limit = row.limit
                    line.x = [*map(float, line.x), amount]
                    line.y.append(amount / row.median_s / scale)
            if lines and any(line.limit for line in lines.values()):
                title = f"Roofline: {suite}, {place}"
                axis = "bytes that must move" if what == "bytes" else "operations of the products"
                figures.append(
                    Figure(f"roofline-{suite}-{len(figures)}", title, axis, unit,
                           list(lines.values()), "scatter",
                           note=_LIMITS_NOTE)
                )  # fmt: skip
    return figures


def _memory(suite: str, rows: Sequence[Row]) -> list[Figure]:
    """Of each device apart, at its largest number of threads."""
    places: dict[str, list[Row]] = {}
    for row in rows:
        if row.peak_bytes is not None and row.direction == "both" and row.allocator == "default":
            places.setdefault(row.unusual, []).append(row)
    figures = []
    for k, (where, measured) in enumerate(places.items()):
        threads = max(row.threads for row in measured)
        lines: dict[str, Line] = {}
        for row in measured:
            if row.threads == threads:
                line = lines.setdefault(row.provider, Line(row.provider, [], []))
                line.limit = row.limit
                line.x = [*map(str, line.x), _label(row)]
                line.y.append((row.peak_bytes or 0) / 2**20)
        figures.append(
            Figure(f"memory-{suite}" + f"-{k}" * bool(k),
                   f"Peak memory above the inputs: {suite}{where}", "MiB", "",
                   list(lines.values()), "bars",
                   note="Of one call, with the default allocator. Without a bar nothing was taken.")
        )  # fmt: skip
    return figures
