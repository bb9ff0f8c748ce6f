"""How much memory forward and backward of one optimisation step take, with each loss.

Each case runs in a process of its own, forked from one that has done nothing but its imports. What
the process holds before (libraries, the model, what one short sequence leaves behind) is
subtracted. The peak is VmHWM, which starts with the process; ru_maxrss would start with the
parent's peak. The token ids are arbitrary: memory does not depend on them.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from demo_parts.config import CUTS, Config
from demo_parts.model import LOSSES, new_model
from demo_parts.text import Batch
from demo_parts.training import accumulate


def measure(config: Config, vocabulary: int, tick: Callable[[], None]) -> dict[str, Any]:
    """MiB at the peak above what the process held before, for each loss and cut."""
    results: dict[str, Any] = {name: {} for name in LOSSES}
    arguments = [json.dumps(dataclasses.asdict(config)), str(vocabulary)]
    command = [sys.executable, "-m", "demo_parts.memory", *arguments, str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            name, cut, peak = json.loads(line)
            results[name][cut] = peak
            tick()
    if process.returncode != 0:
        raise RuntimeError(f"demo: the measurement of memory ended with {process.returncode}")
    return results


def peak(name: str, cut: str, config: Config, vocabulary: int, threads: int) -> float:
    """MiB at the peak of two optimisation steps in this process, above what it holds before."""
    torch.set_num_threads(threads)
    model = new_model(config, vocabulary)
    tokens = torch.arange(config.batch * config.context).view(config.batch, -1) % vocabulary
    accumulate(model, [Batch(tokens[:1, :8], tokens[:1, :8])], LOSSES[name])
    with suppress(OSError):  # forget the peak so far; where that is refused, it is a low one anyway
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(2):
        model.zero_grad()
        accumulate(model, Batch(tokens, tokens).cut(CUTS[cut]), LOSSES[name])
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """A field of this process's status, in MiB."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


def _main(sizes: str, vocabulary: str, threads: str) -> None:
    config = Config(**json.loads(sizes))
    context = multiprocessing.get_context("fork")
    for cut in config.memory_cuts:
        for name in LOSSES:
            with context.Pool(1) as pool:
                case = (name, cut, config, int(vocabulary), int(threads))
                print(json.dumps([name, cut, pool.apply(peak, case)]), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
