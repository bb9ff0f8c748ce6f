"""Whether ``bench ab`` can be believed: ``python bench/ab_check.py``.

It is run many times on two builds that are one and the same, where it must not say SLOWER (nor
FASTER), and many times against the same build with a planted slowdown, where it must: each call
of ``loss_and_grad`` then waits for a tenth of the time that it took. What is measured is the suite
in ``ab_suite.py``. The result is printed and written to ``bench/results/ab_check.json``; status 1
if one of the runs said otherwise. Twenty of each take 25 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbkern.bench import compare, machine
from mbkern.bench.arguments import check_output, count
from mbkern.bench.display import Progress

RESULT = Path(__file__).with_name("results") / "ab_check.json"
OPTIONS = ("cached", "--suite-file", str(Path(__file__).with_name("ab_suite.py")),
           "--threads", "1", "--seconds", "1")  # fmt: skip
PLANTED = """\
import time

import torch
import mbkern

kernel = mbkern.loss_and_grad


def slowed(*args, **options):
    begin = time.perf_counter()
    result = kernel(*args, **options)
    end = time.perf_counter()
    while time.perf_counter() < end + {share} * (end - begin):
        pass
    return result


mbkern.loss_and_grad = slowed
"""


@dataclass(frozen=True)
class Verdicts:
    """What one run of ``bench ab`` said: its exit status, and a verdict and a ratio a case."""

    status: int
    verdicts: tuple[str, ...]
    ratios: tuple[float, ...]

    @property
    def flagged(self) -> bool:
        return self.status == 1 and compare.SLOWER in self.verdicts

    @property
    def silent(self) -> bool:
        return self.status == 0 and not {compare.SLOWER, compare.FASTER} & set(self.verdicts)


def slow_python(folder: Path, share: float) -> Path:
    """An interpreter like this one, in which ``loss_and_grad`` takes ``share`` more time."""
    (folder / "sitecustomize.py").write_text(PLANTED.format(share=share))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def run(a: str, b: str, folder: Path) -> Verdicts:
    """``bench ab`` once, with a threshold of 5 %; RuntimeError where it fails as a whole."""
    paths = [folder / "a.jsonl", folder / "b.jsonl"]
    for path in paths:
        path.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "mbkern", "bench", "ab", "--a", a, "--b", b, "--fail-if", "slower:5%",
        "--output-a", str(paths[0]), "--output-b", str(paths[1]), *OPTIONS,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.sep)
    if done.returncode not in (0, 1) or not all(path.exists() for path in paths):
        raise RuntimeError(f"bench ab ended with {done.returncode}: {done.stderr[-2000:]}")
    (old, new), _ = compare.read(paths)
    found = compare.compare(old, new, compare.Rule().threshold)
    return Verdicts(
        done.returncode,
        tuple(c.verdict for c in found),
        tuple(round(c.ratio.median, 4) for c in found if c.ratio),
    )


def main(argv: Sequence[str]) -> int:
    """All runs, A-A and planted in turns."""
    parser = argparse.ArgumentParser(prog="bench/ab_check.py", description=__doc__)
    parser.add_argument("--times", type=count, default=20, help="runs of each kind (default 20)")
    parser.add_argument("--share", type=float, default=0.10, help="planted slowdown (default 0.10)")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    args = parser.parse_args(argv)
    check_output(args.output, parser)
    same: list[Verdicts] = []
    planted: list[Verdicts] = []
    progress = Progress(2 * args.times)
    with tempfile.TemporaryDirectory() as name:
        slow = str(slow_python(Path(name), args.share))
        for k in range(args.times):
            for kind, b, runs in (("A-A", sys.executable, same), ("planted", slow, planted)):
                progress.case(f"{kind} {k + 1}")
                runs.append(run(sys.executable, b, Path(name)))
    progress.end()
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "planted": args.share,
        "A-A not flagged": f"{sum(v.silent for v in same)} of {len(same)}",
        "planted caught": f"{sum(v.flagged for v in planted)} of {len(planted)}",
        "A-A": [[v.verdicts, v.ratios] for v in same],
        "slowed": [[v.verdicts, v.ratios] for v in planted],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for what in ("A-A not flagged", "planted caught"):
        print(f"{what}: {result[what]}")
    return int(not all(v.silent for v in same) or not all(v.flagged for v in planted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
