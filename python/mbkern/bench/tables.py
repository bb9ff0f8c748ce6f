"""Tables for the terminal (rich, or plain text without it) and for Markdown."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Literal

try:
    from rich.console import Console
    from rich.table import Table as RichTable
except ImportError:  # plain text will do
    Console = None  # type: ignore[assignment, misc]

HAS_RICH = Console is not None
WRAPPED = ("note", "value")  # columns of words, which may take several lines


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading. Columns whose head starts with a space are aligned right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def is_plain(stream: IO[str]) -> bool:
    """Whether plain text goes there: no terminal or a dumb one, NO_COLOR is set, or no rich.

    On a dumb terminal rich takes 80 columns, whatever it is told, and leaves cells out.
    """
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return Console is None or "NO_COLOR" in os.environ or dumb or not stream.isatty()


def show(table: Table) -> None:
    """Print to the terminal."""
    if is_plain(sys.stdout):
        print(plain(table))
        return
    # A narrower terminal wraps lines: rich would leave letters of cells out.
    console = Console(width=max(Console().width, _least_width(table)))
    drawn = RichTable(
        title=table.title.replace("[", "\\["), title_justify="left", title_style="bold"
    )
    for head in table.head:
        justify: Literal["left", "right"] = "right" if head[0] == " " else "left"
        drawn.add_column(head.strip(), justify=justify, no_wrap=head not in WRAPPED)
    grouped = any(not row[0] for row in table.rows)
    for row in table.rows:
        if grouped and row[0]:
            drawn.add_section()
        bad = any(cell.startswith(("FAIL", "WRONG")) for cell in row)
        drawn.add_row(*(cell.replace("[", "\\[") for cell in row), style="red" if bad else None)
    console.print(drawn)


def _least_width(table: Table) -> int:
    """Of the drawn table with every cell whole, but for those that may take several lines."""
    widths = [
        max(len(line[k].strip()) for line in (table.head, *table.rows))
        for k in range(len(table.head))
    ]
    kept = [min(w, 30) if h in WRAPPED else w for h, w in zip(table.head, widths, strict=True)]
    return sum(kept) + 3 * len(kept) + 1


def plain(table: Table) -> str:
    """The table as text in columns."""
    lines = [[h.strip() for h in table.head], *table.rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(table.head))]
    right = [h[0] == " " for h in table.head]
    text = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([table.title, *text, ""])


def markdown(table: Table) -> str:
    """The table in Markdown, under a heading."""
    bars = ["---:" if h[0] == " " else "---" for h in table.head]
    lines = [[h.strip() for h in table.head], bars, *table.rows]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([f"## {table.title}", "", *body, ""])
