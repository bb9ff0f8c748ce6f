"""compute-sanitizer over small calls: memcheck, racecheck, initcheck, synccheck.

Torch's caching allocator is off, so that every tensor is an allocation of its own. Before anything
is believed, the tool must find a planted write out of bounds; where it cannot, the stage is
reported as not run. Findings in kernels that are not ours are counted apart.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.stage import FAILED, NOT_RUN, PASSED, Clock, Outcome, Report, python, run

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
OURS = "mbk::"  # the namespace of every kernel


@dataclass(frozen=True)
class Findings:
    """What a tool reported.

    Attributes:
        finished: it has printed its summary.
        errors: as the summary counts them.
        ours: reports that name one of our kernels.
        first: the first line of the first of those, or of the first report.
    """

    finished: bool
    errors: int
    ours: int
    first: str


def parse(output: str) -> Findings:
    """Read a tool's lines: a report is a line and those indented below it."""
    reports: list[list[str]] = []
    errors, finished = 0, False
    for line in output.splitlines():
        if not line.startswith("========="):
            continue  # what the program prints
        text = line.lstrip("=")
        if summary := re.search(r"SUMMARY: (\d+) (?:error|hazard)", text):
            errors, finished = errors + int(summary[1]), True
        elif text.startswith("  ") and reports:
            reports[-1].append(text.strip())
        else:
            reports.append([text.strip()])
    reports = [report for report in reports if len(report) > 1]
    ours = [report for report in reports if any(OURS in line for line in report)]
    first = (ours or reports or [[""]])[0][0]
    return Findings(finished, errors, len(ours), first)


def find_tool() -> str | None:
    """compute-sanitizer, from PATH or where a toolkit puts it."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    paths = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(paths))


def _blind(tool: str, clock: Clock) -> str:
    """Why the tool cannot be believed here, or an empty string."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder) / "planted"
        built = run([nvcc, "-arch=native", HERE / "planted.cu", "-o", planted], 60)
        if not built.good:
            return f"the planted fault does not compile: {built.failure()}"
        found = run([tool, "--tool", "memcheck", planted], min(60, clock.left()))
    seen = parse(found.output)
    if not seen.finished:
        return f"the tool cannot attach: {found.failure()}"
    return "" if seen.errors else f"the tool does not see a planted fault: {found.ending()}"


def _small_calls(tool: str, name: str, clock: Clock) -> Outcome:
    command = [tool, "--tool", name, "--report-api-errors", "no", "--error-exitcode", "99"]
    kind = "few" if name == "racecheck" else "all"
    program = python(HERE / "small_calls.py", "cuda", kind)
    return run([*command, *program], clock.left(), ENVIRONMENT)


def check(clock: Clock) -> Report:
    """All tools side by side: they keep the host busy, not the device."""
    tool = find_tool()
    if tool is None:
        return Report(NOT_RUN, "no compute-sanitizer")
    if blind := _blind(tool, clock):
        return Report(NOT_RUN, blind)
    details: dict[str, Any] = {}
    wrong, unfinished = [], []
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        outcomes = list(pool.map(lambda name: _small_calls(tool, name, clock), TOOLS))
    for name, done in zip(TOOLS, outcomes, strict=True):
        found = parse(done.output)
        # Only initcheck blames others for what it has not seen: copies that the driver makes.
        bad = found.ours > 0 or (found.errors > 0 and name != "initcheck")
        bad |= found.finished and "0 results differ" not in done.output
        details[name] = {
            "finished": found.finished, "errors": found.errors, "in our kernels": found.ours,
            "first": found.first, "seconds": round(done.seconds),
        }  # fmt: skip
        print(f"{name}: {details[name]}", flush=True)
        if bad:
            wrong.append(f"{name}: {found.first or done.failure()}")
        elif not found.finished:
            unfinished.append(f"{name}: {done.failure()}")
    if wrong:
        return Report(FAILED, "; ".join(wrong), details)
    if unfinished:
        partly = "" if len(unfinished) == len(TOOLS) else "in part: "
        return Report(NOT_RUN, partly + "; ".join(unfinished), details)
    return Report(PASSED, "", details)


def rehearse(clock: Clock) -> Report:
    """The small calls on the CPU, without the tool."""
    done = run(python(HERE / "small_calls.py", "cpu"), clock.left())
    print(done.output)
    return Report(PASSED if done.good else FAILED, "" if done.good else done.failure())
