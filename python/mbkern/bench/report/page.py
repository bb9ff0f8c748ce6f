"""One self-contained page: interactive plots by plotly, tables, the machine, warnings.

The page follows the reader's theme; ``#dark`` and ``#light`` after its address force one. It
counts what it has drawn and keeps script errors in attributes of its body (data-drawn, data-errors,
data-overflow), which is how ``tests/test_bench_report.py`` looks at it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from textwrap import wrap
from typing import Any

from mbkern.bench.display import LEGEND
from mbkern.bench.report.figures import Figure, Line
from mbkern.bench.tables import Table


def render(title: str, figures: Sequence[Figure], tables: Sequence[Table], notes: Sequence[str],
           machines: Sequence[Table]) -> str:  # fmt: skip
    """The page as text. ImportError without plotly."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    folder = files("mbkern.bench.report")
    style = (folder / "page.css").read_text("utf-8")
    script = (folder / "page.js").read_text("utf-8")
    specs = json.dumps([_spec(figure) for figure in figures]).replace("</", "<\\/")
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>", f"<style>{style}</style>",
        f"<script>{get_plotlyjs()}</script>", "</head>", "<body>",
        f"<h1>{html.escape(title)}</h1>", *_list("notes", notes),
        *(part for k, figure in enumerate(figures) for part in _section(k, figure)),
        "<h2>Tables</h2>", *_list("legend", LEGEND), *map(_table, tables), "<h2>Machine</h2>",
        *(_table(facts, is_open=True) for facts in machines),
        f"<script>const specs = {specs};\n{script}</script>", "</body>", "</html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _list(kind: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    return [f"<ul class='{kind}'>", *(f"<li>{html.escape(t)}</li>" for t in texts), "</ul>"]


def _section(number: int, figure: Figure) -> list[str]:
    note = f"<p>{html.escape(figure.note)}</p>" if figure.note else ""
    return [
        f"<section><h2>{html.escape(figure.title)}</h2>{note}",
        f"<div class='plot' id='plot-{number}'></div></section>",
    ]


def _table(table: Table, is_open: bool = False) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        right = [head[:1] == " " for head in table.head]
        return "".join(
            f"<{tag}{' class=right' if r else ''}>{html.escape(c.strip())}</{tag}>"
            for c, r in zip(row, right, strict=True)
        )

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>{html.escape(table.title)}</summary><div class='wide'><table>"
        f"<thead><tr>{cells(table.head, 'th')}</tr></thead><tbody>{rows}</tbody></table></div>"
        "</details>"
    )


def _spec(figure: Figure) -> dict[str, Any]:
    flat = figure.kind in ("points", "bars")
    labels = list(dict.fromkeys(str(x) for line in figure.lines for x in line.x)) if flat else []
    rows = len(labels) * (1 if figure.kind == "points" else max(1, len(figure.lines) / 2))
    layout: dict[str, Any] = {
        "height": 160 + 34 * rows if flat else 420,
        "xaxis": {"title": {"text": figure.x}, "type": "log", "automargin": True},
        "yaxis": {"title": {"text": figure.y}, "type": "log", "automargin": True,
                  "exponentformat": "power"},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "barmode": "group",
    }  # fmt: skip
    if flat:
        layout["yaxis"] = {"automargin": True, "autorange": "reversed", "type": "category"}
        layout["xaxis"]["type"] = "log" if figure.kind == "points" else "linear"
    if figure.reference is not None:
        at = figure.reference
        layout["shapes"] = [
            {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": "#888", "width": 1}}
        ]  # fmt: skip
    traces = [_trace(figure, line) for line in figure.lines]
    traces += [_mark(line) for line in figure.lines if line.mark is not None]
    if figure.panels:
        traces += _below(figure, layout)
    return {"data": traces, "layout": layout}


def _below(figure: Figure, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Traces of the panels, each with an axis of its own in the lower half of the figure."""
    count = len(figure.panels)
    layout["height"] += 170 * count
    layout["xaxis"]["anchor"] = f"y{count + 1}"
    layout["yaxis"]["domain"] = [0.54, 1.0]
    traces = []
    for k, panel in enumerate(figure.panels):
        top = 0.5 * (1 - k / count)
        layout[f"yaxis{k + 2}"] = {
            "title": {"text": panel.y}, "domain": [top - 0.5 / count + 0.04, top],
            "rangemode": "tozero", "automargin": True, "exponentformat": "power",
        }  # fmt: skip
        for line, size in zip(panel.lines, panel.marks, strict=True):
            marker = {"color": line.colour, "size": 2 * size}
            own = {"yaxis": f"y{k + 2}", "showlegend": False, "marker": marker}
            traces.append(_trace(figure, line) | own)
    return traces


def _errors(line: Line) -> dict[str, Any]:
    above = [max(0.0, high - y) for y, high in zip(line.y, line.high, strict=True)]
    below = [max(0.0, y - low) for y, low in zip(line.y, line.low, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "width": 3,
            "thickness": 1.2}  # fmt: skip


def _trace(figure: Figure, line: Line) -> dict[str, Any]:
    trace: dict[str, Any] = {"name": line.name, "type": "scatter", "mode": "lines+markers"}
    trace["marker"] = {"color": line.colour, "size": 7}
    if figure.kind in ("points", "bars"):
        names = ["<br>".join(wrap(str(x), 24, break_long_words=False)) for x in line.x]
        trace |= {"x": line.y, "y": names, "mode": "markers"}
        if figure.kind == "bars":
            trace |= {"type": "bar", "orientation": "h"}
        elif line.low:
            trace["error_x"] = _errors(line)
        return trace
    trace |= {"x": line.x, "y": line.y, "line": {"color": line.colour, "width": 2}}
    if line.dotted:
        trace["line"]["dash"] = "dot"
    if line.limit:
        trace["line"]["dash"] = "dash"
        trace["marker"]["symbol"] = "diamond"
    if figure.kind == "scatter":
        trace["mode"] = "markers"
    if line.low:
        trace["error_y"] = _errors(line)
    return trace


def _mark(line: Line) -> dict[str, Any]:
    at = [float(x) for x in line.x].index(float(line.mark or 0.0))
    return {
        "x": [line.mark], "y": [line.y[at]], "type": "scatter", "mode": "markers",
        "name": f"knee of {line.name}: {line.mark:g}", "showlegend": False,
        "marker": {"color": line.colour, "size": 15, "symbol": "circle-open",
                   "line": {"width": 2}},
    }  # fmt: skip
