"""A report's files: the page, the pictures, and the tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mbkern.bench import conclusions, display, rows
from mbkern.bench.report import figures, page, pictures
from mbkern.bench.rows import Row
from mbkern.bench.tables import Table, markdown


def tables_of(found: Sequence[Row]) -> list[Table]:
    """One for each suite, and what the suites minibatch and scaling are for."""
    by_suite: dict[str, list[Row]] = {}
    for row in found:
        by_suite.setdefault(row.suite, []).append(row)
    made = [display.suite_table(suite, members) for suite, members in by_suite.items()]
    return [*conclusions.tables(found), *(t for t in made if t.rows)]


def report(
    paths: Sequence[Path], folder: Path, title: str, *, with_pictures: bool = True
) -> tuple[list[Path], list[str]]:
    """Write a report on the rows of some files; returns its files, and warnings.

    Raises OSError if a file cannot be read, ValueError without rows, ImportError without plotly or
    matplotlib.
    """
    found: list[Row] = []
    warnings: list[str] = []
    for path in paths:
        loaded, broken = rows.load(path)
        found += loaded
        warnings += broken
    found = list(rows.latest(found).values())
    measured = next((r for r in found if r.environment), None)
    if measured is None:
        raise ValueError("no row in these files has been measured")
    folder.mkdir(parents=True, exist_ok=True)
    notes = [
        *warnings,
        *display.warnings(found),
        *(f"Skipped: {s}" for s in display.skipped(found)),
    ]
    drawn = figures.all_of(found)
    made = tables_of(found)
    facts = display.machine_table(measured, "python -m mbkern bench")
    written = [folder / "report.html", folder / "report.md"]
    written[0].write_text(page.render(title, drawn, made, notes, facts))
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    written[1].write_text("\n".join(lines) + "\n".join(markdown(t) for t in [*made, facts]))
    if with_pictures:
        written += pictures.save(drawn, folder)
    return written, warnings
