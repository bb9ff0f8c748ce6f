"""Figures as PNG and SVG, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from mbkern.bench.report.figures import Figure, Line, Panel


def save(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write each as PNG and SVG; returns the files. ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    files = []
    for figure in figures:
        labels = list(dict.fromkeys(str(x) for line in figure.lines for x in line.x))
        flat = figure.kind in ("points", "bars")
        height = max(3.0, 1.2 + 0.5 * len(labels)) if flat else 4.5
        below = len(figure.panels)
        drawing, grid = pyplot.subplots(
            1 + below, squeeze=False, sharex=True, figsize=(8, height + 1.8 * below),
            height_ratios=[3.0] + [1.2] * below, layout="constrained",
        )  # fmt: skip
        axes, *others = grid[:, 0]
        (_flat if flat else _curves)(axes, figure, labels)
        axes.set_title("\n".join(_even_lines(figure.title)), fontsize=10)
        axes.grid(alpha=0.3)
        for under, panel in zip(others, figure.panels, strict=True):
            _panel(under, panel)
        if others:
            axes.set_xlabel("")
            others[-1].set_xlabel(figure.x)
        drawing.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        for suffix in ("png", "svg"):
            path = folder / f"{figure.key}.{suffix}"
            drawing.savefig(path, dpi=120)
            files.append(path)
        pyplot.close(drawing)
    return files


def _even_lines(text: str) -> list[str]:
    """Of at most 70 letters, and of about the same length: no word alone in the last one."""
    count = len(wrap(text, 70))
    return next(
        lines
        for width in range(-(-len(text) // count), 71)
        if len(lines := wrap(text, width)) == count
    )


def _plain_numbers(axis: Any) -> None:
    """1, 10, 20 below a logarithmic axis, and not powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
            return f"{x:g}"

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))


def _errors(line: Line) -> list[list[float]] | None:
    if not line.low:
        return None
    below = [max(0.0, y - low) for y, low in zip(line.y, line.low, strict=True)]
    above = [max(0.0, high - y) for y, high in zip(line.y, line.high, strict=True)]
    return [below, above]


def _curves(axes: Any, figure: Figure, _: Sequence[str]) -> None:
    for line in figure.lines:
        scatter = figure.kind == "scatter"
        style = "none" if scatter else "--" if line.limit else ":" if line.dotted else "-"
        axes.errorbar(
            line.x, line.y, yerr=_errors(line), label=line.name, color=line.colour,
            linestyle=style, marker="D" if line.limit else "o", markersize=4, capsize=2,
        )  # fmt: skip
        if line.mark is not None:
            at = list(line.x).index(line.mark)
            axes.plot([line.mark], [line.y[at]], "o", markersize=11, fillstyle="none",
                      color=line.colour)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=figure.x, ylabel=figure.y)
    if figure.kind == "line":
        _plain_numbers(axes.xaxis)


def _panel(axes: Any, panel: Panel) -> None:
    for line, size in zip(panel.lines, panel.marks, strict=True):
        axes.plot(line.x, line.y, "o-", markersize=size, color=line.colour)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_ylabel(panel.y)
    axes.grid(alpha=0.3)


def _flat(axes: Any, figure: Figure, labels: Sequence[str]) -> None:
    share = 0.8 / max(1, len(figure.lines))
    for k, line in enumerate(figure.lines):
        shift = (k - (len(figure.lines) - 1) / 2) * share
        at = [labels.index(str(x)) + shift for x in line.x]
        if figure.kind == "bars":
            axes.barh(at, line.y, share, label=line.name, color=line.colour)
        else:
            axes.errorbar(line.y, at, xerr=_errors(line), fmt="o", markersize=4, capsize=2,
                          label=line.name, color=line.colour)  # fmt: skip
    if figure.reference is not None:
        axes.axvline(figure.reference, color="#888", linewidth=1)
    if figure.kind == "points":
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(figure.x)
