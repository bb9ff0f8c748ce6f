"""A report's files: the page, the pictures, and the tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mbkern.bench import compare, conclusions, display, rows
from mbkern.bench.report import figures, page, pictures
from mbkern.bench.rows import Row
from mbkern.bench.tables import Table, markdown

SETTING = (*compare.MACHINE, "commit", "mbkern built from")


def tables_of(found: Sequence[Row]) -> list[Table]:
    """One for each suite, and what the suites minibatch and scaling are for."""
    by_suite: dict[str, list[Row]] = {}
    for row in found:
        by_suite.setdefault(row.suite, []).append(row)
    made = [display.suite_table(suite, members) for suite, members in by_suite.items()]
    return [*conclusions.tables(found), *(t for t in made if t.rows)]


def _machines(found: Sequence[Row]) -> list[list[Row]]:
    """Rows by machine and software, in the order of the rows."""
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        if row.environment:
            facts = tuple(str(row.environment.get(name)) for name in SETTING)
            machines.setdefault(facts, []).append(row)
    return list(machines.values())


def _of_several(machines: Sequence[Sequence[Row]], replaced: int) -> list[str]:
    """Warnings: rows that differ in more than what was measured, and rows that are not shown."""
    notes = []
    if len(machines) > 1:
        notes.append(
            f"WARNING: these rows are of {len(machines)} machines or versions, listed below; "
            "ratios are of rows of one run only, and times of different ones are not comparable."
        )
    for k, others in enumerate(machines[1:], 2):
        sides = ("machine 1", f"machine {k}")
        notes += compare.differences(machines[0], others, SETTING, sides)
    if replaced:
        notes.append(f"{replaced} rows were measured again later, and only the last is shown.")
    return notes


def _machine_table(k: int, machines: Sequence[Sequence[Row]]) -> Table:
    mine = machines[k]
    title = f"Machine {k + 1} of {len(machines)}" if len(machines) > 1 else "Machine"
    suites = ", ".join(dict.fromkeys(row.suite for row in mine))
    command = "python -m mbkern bench"
    return display.machine_table(mine[0], title, command=command, rows=f"{len(mine)}: {suites}")


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
    every, found = found, list(rows.latest(found).values())
    shown = set(map(id, found))
    replaced = sum(bool(row.samples_s) and id(row) not in shown for row in every)
    machines = _machines(found)
    if not machines:
        broken_lines = f"; {warnings[0]}" if warnings else ""
        raise ValueError(f"no row in these files has been measured{broken_lines}")
    folder.mkdir(parents=True, exist_ok=True)
    notes = [
        *_of_several(machines, replaced),
        *warnings,
        *display.warnings(found),
        *conclusions.notes(found),
        *(f"Skipped: {s}" for s in display.skipped(found)),
    ]
    drawn = figures.all_of(found)
    made = tables_of(found)
    facts = [_machine_table(k, machines) for k in range(len(machines))]
    written = [folder / "report.html", folder / "report.md"]
    written[0].write_text(page.render(title, drawn, made, notes, facts), encoding="utf-8")
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), "", "Columns of the suites:", ""]
    lines += [*(f"- {text}" for text in display.LEGEND), "", ""]
    text = "\n".join(lines) + "\n".join(markdown(t) for t in [*made, *facts])
    written[1].write_text(text, encoding="utf-8")
    if with_pictures:
        written += pictures.save(drawn, folder)
    return written, warnings
