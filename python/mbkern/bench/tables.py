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
WIDTH = 180  # narrower terminals wrap lines, rather than lose cells


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading. Columns whose head starts with a space are aligned right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def is_plain(stream: IO[str]) -> bool:
    """Whether plain text goes there: no terminal, NO_COLOR is set, or rich is missing."""
    return Console is None or "NO_COLOR" in os.environ or not stream.isatty()


def show(table: Table) -> None:
    """Print to the terminal."""
    if is_plain(sys.stdout):
        print(plain(table))
        return
    console = Console()
    console = Console(width=max(console.width, WIDTH))
    drawn = RichTable(
        title=table.title.replace("[", "\\["), title_justify="left", title_style="bold"
    )
    for head in table.head:
        justify: Literal["left", "right"] = "right" if head[0] == " " else "left"
        drawn.add_column(head.strip(), justify=justify, no_wrap=head not in ("note", "value"))
    grouped = any(not row[0] for row in table.rows)
    for row in table.rows:
        if grouped and row[0]:
            drawn.add_section()
        bad = any(cell.startswith(("FAIL", "WRONG")) for cell in row)
        drawn.add_row(*(cell.replace("[", "\\[") for cell in row), style="red" if bad else None)
    console.print(drawn)


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
