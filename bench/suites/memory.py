"""Peak memory above the inputs, of each way, in a process of its own.

The process makes the inputs, runs the way once (code, thread pool and caches are then there), drops
the result, gives free memory back to the system, and resets the kernel's high-water mark of
resident memory. A second run follows; the measurement is VmHWM after it less VmRSS before it. Where
the mark cannot be reset, the first run is left out and the inputs, which were made without
temporaries, are the mark. Every block of 128 KiB or more is a mapping of its own there, so that
memory which the first run has freed cannot serve the second unseen. The kernel counts resident
pages in batches, so a difference below half a MiB means little.

Beside it stands what is promised: the gradient (nothing in place), two fp32 values a row, one fp32
row a thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from suite_settings import NONE, Settings, progress

from mbkern.bench.allocator import DEFAULT, environment
from mbkern.bench.results import Entry, Group
from suites.cross_entropy import AUTOGRAD, COMPILED, IN_PLACE, TORCH
from suites.problem import Case

STATES = (DEFAULT,)
SUITE = "memory"
PROMISED = "promised: "
MIB = 2.0**20
_MAPPED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}

# Wide enough, many rows, long rows: each makes another part of the promise the one that counts. The
# state of a row and the row of a thread are needed in 16 bits, where the gradient is formed in
# backward and the terms do not fit into it.
CASES = (
    Case((2048, 32000)),
    Case((2048, 32000), torch.bfloat16),
    Case((1 << 22, 16), torch.bfloat16),
    Case((64, 1 << 20), torch.bfloat16),
)
QUICK = (Case((512, 32000)), Case((1 << 20, 16), torch.bfloat16))


def promised_bytes(case: Case, in_place: bool, threads: int) -> int:
    """The promise of the design."""
    rows, columns = case.shape
    gradient = 0 if in_place else rows * columns * case.dtype.itemsize
    return gradient + 2 * 4 * rows + threads * 4 * columns


def _measure(case: Case, way: str, threads: int) -> Entry:
    asked = {"shape": case.shape, "dtype": case.dtype_name, "way": way, "threads": threads}
    worker = Path(__file__).with_name("memory_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(asked)],
        capture_output=True, text=True, check=False, env={**environment(DEFAULT), **_MAPPED},
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return Entry(way, note=f"skipped: {lines[-1][:100]}")
    answer = json.loads(done.stdout)
    return Entry(way, [answer["bytes"] / MIB], note=answer["method"])


def run(settings: Settings) -> list[Group]:
    """Each case at the largest number of threads."""
    threads = max(settings.threads)
    groups = []
    for case in QUICK if settings.quick else CASES:
        progress(str(case), threads)
        entries = [_measure(case, way, threads) for way in (TORCH, AUTOGRAD, IN_PLACE)]
        if settings.compile != NONE and case is CASES[0]:
            entries.append(_measure(case, COMPILED, threads))
        for way in (AUTOGRAD, IN_PLACE):
            promise = promised_bytes(case, way == IN_PLACE, threads) / MIB
            entries.append(Entry(PROMISED + way, [promise], note="computed"))
        inputs = case.shape[0] * (case.columns * case.dtype.itemsize + 8) / MIB
        groups.append(
            Group(
                SUITE, f"{case}, inputs {inputs:.0f} MiB", threads, settings.allocator, "MiB",
                TORCH, entries, case.columns, case.dtype_name,
            )
        )  # fmt: skip
    return groups
