"""The numbers that README.md quotes, from bench/results/readme.jsonl.

    python bench/readme.py             status 1 if the README says anything else
    python bench/readme.py --write     write them
    python bench/readme.py --measure   measure them anew (some minutes), then write

Between the markers stand tables of medians of paired ratios, torch over mbkern: how many times
faster. Each cell has one number for each number of threads.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mbkern.bench.display import speedup
from mbkern.bench.machine import BUSY
from mbkern.bench.rows import SKIPPED, Row, grouped, load
from mbkern.bench.statistics import summarise

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "readme.jsonl"
README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: python bench/readme.py --write -->", "<!-- end of numbers -->"
COLUMNS = [
    (provider, state)
    for provider in ("mbkern in place", "mbkern autograd")
    for state in ("recycled", "default")
]
COMMANDS = [
    *(["cross_entropy", "--model", model] for model in ("imagenet", "gpt-2", "llama-3-8b")),
    ["pointwise", "rows", "overhead", "--short"],
]
OPTIONS = ["--directions", "both", "--threads", "1,2", "--providers", "torch,mbkern",
           "--seconds", "0.5"]  # fmt: skip


def measure() -> None:
    """Replace the results file."""
    RESULTS.unlink(missing_ok=True)
    for words in COMMANDS:
        command = [sys.executable, "-m", "mbkern", "bench", *words, *OPTIONS]
        subprocess.run(
            [*command, "--output", str(RESULTS)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
        )


def _ratios(rows: Sequence[Row]) -> dict[tuple[str, str, str, str, int], str]:
    """How many times faster than torch, by case, dtype, provider, allocator, threads."""
    found = {}
    for group in grouped(rows).values():
        base = next((r for r in group if r.provider == r.baseline), None)
        for row in group:
            ratio = speedup(row, base)
            if ratio is not None:
                key = (row.case, row.dtype, row.provider, row.allocator, row.threads)
                found[key] = _digits(ratio.median)
    return found


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    """A row for each case; columns that no case has a number for are left out."""
    ratios = _ratios(rows)
    threads = sorted({r.threads for r in rows})
    columns = [c for c in COLUMNS if any(key[2:4] == c for key in ratios)]
    heads = [f"{p.removeprefix('mbkern ')}, {state}" for p, state in columns]
    lines = [f"| {title} | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for case, dtype in dict.fromkeys((r.case, r.dtype) for r in rows):
        cells = [
            ", ".join(ratios[case, dtype, provider, state, t] for t in threads)
            for provider, state in columns
        ]
        lines.append(f"| {case} {dtype} | {' | '.join(cells)} |")
    return lines


def _spread(rows: Sequence[Row]) -> str:
    """How far the quartiles of a row's samples are apart: the median of the rows."""
    return f"{statistics.median(summarise(r.samples_s).spread for r in rows):.1%}"


def _noise(rows: Sequence[Row]) -> list[str]:
    """How far samples spread where a row waits for arithmetic, and where it waits for memory."""
    ours = [r for r in rows if r.provider.startswith("mbkern")]
    scalar = [r for r in ours if "scalar" in r.provider]
    passes = [r for r in rows if r.limit and "pass" in r.provider]
    return [
        f"Quartiles of mbkern's samples are {_spread(ours)} of the median apart, in the median of",
        f"all rows; {_spread(scalar)} on the scalar tier, which waits for arithmetic, and",
        f"{_spread(passes)} in bare passes over memory.",
    ]


def text(rows: Sequence[Row]) -> str:
    """What stands between the markers. KeyError if a case lacks a number."""
    noise = _noise([r for r in rows if r.samples_s])
    rows = [r for r in rows if r.status != SKIPPED and not r.limit]
    machine = rows[0].environment
    isa = machine["isa"].split()[0]
    threads = " and with ".join(str(t) for t in sorted({r.threads for r in rows}))
    loads = sorted(r.environment["cpus taken by others"] or 0.0 for r in rows)
    typical, most = loads[len(loads) // 2], loads[-1]
    busy = "The machine was busy: others" if typical > BUSY else "Others"
    lines = [
        f"Forward and backward against torch {machine['torch']} in the same process, taken in",
        f"turns, on {machine['cpus']} CPUs of an {machine['cpu']} ({isa}): how many times faster,",
        f"as medians of paired ratios with {threads} threads. Recycled: large blocks are reused by",
        "the allocator; default: they are fresh pages at each call, which cost torch more than its",
        "arithmetic.",
        f"{busy} took {typical:.2f} CPUs meanwhile, at most {most:.2f}. Measured on",
        f"{machine['date'][:10]} by `python bench/readme.py --measure`.",
        *noise,
        "",
        *_table("logits", [r for r in rows if r.suite == "cross_entropy"]),
        "",
        *_table("other losses", [r for r in rows if r.suite in ("pointwise", "rows")]),
        "",
        *_table("a tiny call", [r for r in rows if r.suite == "overhead"]),
    ]
    return "\n".join(lines)


def current() -> str:
    """What the README has between the markers; ValueError without them."""
    content = README.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{README} needs one {BEGIN} and one {END}")
    return content.split(BEGIN)[1].split(END)[0].strip()


def main(argv: Sequence[str]) -> int:
    """Check, write, or measure and write."""
    parser = argparse.ArgumentParser(
        prog="bench/readme.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args(argv)
    if args.measure:
        measure()
    rows, warnings = load(RESULTS)
    if warnings:
        parser.error("; ".join(warnings))
    made, there = text(rows), current()
    if args.write or args.measure:
        before, after = README.read_text().split(BEGIN)[0], README.read_text().split(END)[1]
        README.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
        return 0
    if made != there:
        print(f"README.md does not say what {RESULTS.name} says: python bench/readme.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
