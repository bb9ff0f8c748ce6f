"""The planner against exhaustive search over micro-batch sizes: ``python bench/planner.py``.

Four models, built from configuration, on the CPU. In a process for each, ``mbkern.plan`` chooses a
micro-batch; then every size of a dense list is timed over whole mini-batches, all in turns. The
best size is that with the best median of paired ratios to the planner's size in the even rounds,
and its lead is taken from the odd ones, or the luckiest of many would seem the best. The peak is
measured in fresh processes that do nothing but the planned window, three of them (the median
counts), and compared with what was predicted: of the whole process, which is what a limit is about,
and of the part above what is held before a pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbkern
from mbkern import _plan_memory
from mbkern.bench import machine
from mbkern.bench.arguments import check_output, count, seconds
from mbkern.bench.results import Entry
from mbkern.bench.timing import Effort, Way, interleave

Made = tuple[Callable[[Any], Tensor], Callable[[int], Any], int]
RESULT = Path(__file__).with_name("results") / "planner.json"
CPU = torch.device("cpu")


def mlp() -> Made:
    """Wide layers over vectors: overhead counts, and weights dominate memory."""
    sizes = [256, 512, 512, 512]
    layers = [(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(sizes)]
    net = nn.Sequential(*(part for pair in layers for part in pair), nn.Linear(512, 10))

    def step(batch: Any) -> Tensor:
        return F.cross_entropy(net(batch["x"]), batch["y"], reduction="sum")

    return step, lambda n: {"x": torch.ones(n, 256), "y": torch.zeros(n).long()}, 512


def convolution() -> Made:
    """Images: activations dominate memory, and large micro-batches fall out of the caches."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip

    def step(batch: Any) -> Tensor:
        return F.cross_entropy(net(batch["x"]), batch["y"], reduction="sum")

    return step, lambda n: {"x": torch.ones(n, 3, 48, 48), "y": torch.zeros(n).long()}, 64


def transformer() -> Made:
    """A language model whose head has the logits of 8000 classes."""
    layer = nn.TransformerEncoderLayer(192, 4, 768, dropout=0.0, batch_first=True)
    net = nn.Sequential(
        nn.Embedding(8000, 192),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(192, 8000),
    )

    def step(batch: Any) -> Tensor:
        logits = net(batch["ids"]).flatten(0, 1)
        return F.cross_entropy(logits, batch["ids"].flatten(), reduction="sum")

    return step, lambda n: {"ids": torch.ones(n, 48).long()}, 64


def recurrent() -> Made:
    """Many small operations one after the other, whose cost the items share."""
    embedding, body, head = (
        nn.Embedding(128, 48),
        nn.GRU(48, 96, batch_first=True),
        nn.Linear(96, 128),
    )

    def step(batch: Any) -> Tensor:
        logits = head(body(embedding(batch["ids"]))[0]).flatten(0, 1)
        return F.cross_entropy(logits, batch["ids"].flatten(), reduction="sum")

    return step, lambda n: {"ids": torch.ones(n, 64).long()}, 128


MODELS: dict[str, Callable[[], Made]] = {
    f.__name__: f for f in (mlp, convolution, transformer, recurrent)
}


def sizes_of(batch: int, planned: int) -> list[int]:
    """Every size that gives another number of passes, thinned to steps of an eighth."""
    every = sorted({-(-batch // passes) for passes in range(1, batch + 1)} | {planned})
    kept = [planned]
    for n in every:
        if all(abs(n - other) > n / 8 for other in kept):
            kept.append(n)
    return sorted(kept)


def window(step: Callable[[Any], Tensor], batch: Any, size: int) -> Callable[[], None]:
    """All gradient passes of a mini-batch."""

    def run() -> None:
        for part in mbkern.micro_batches(batch, size):
            step(part).backward()

    return run


def search(name: str, threads: int, seconds: float) -> dict[str, Any]:
    """Plan, then measure every size."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step, sample, batch_size = MODELS[name]()
    plan = mbkern.plan(step, sample, batch_size)
    batch = sample(batch_size)
    sizes = sizes_of(batch_size, plan.micro_batch)
    ways = [Way(str(n), window(step, batch, n)) for n in sizes]
    load = machine.OtherLoad()
    entries = interleave(ways, Effort(seconds, 0.0, least=6), unit=1e-9)
    planned = next(e for e in entries if e.name == str(plan.micro_batch))

    def share(entry: Entry, first: int) -> float:
        pairs = zip(entry.samples[first::2], planned.samples[first::2], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    best = min(entries, key=lambda entry: share(entry, 0))
    return {
        "plan": json.loads(plan.to_json()),
        "batch_s": {int(e.name): statistics.median(e.samples) for e in entries},
        "rounds": len(planned.samples),
        "best": int(best.name),
        "share_of_best": share(best, 1),
        "cpus taken by others": load.cpus(),
    }


def window_peak(name: str, threads: int, size: int) -> dict[str, int]:
    """What a process holds and takes that runs two windows."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step, sample, batch_size = MODELS[name]()
    batch = sample(batch_size)
    window(step, sample(2), 2)()
    _plan_memory.settle_heap()  # as plan does for the process that it is called in
    held = _plan_memory.held(CPU)
    run = window(step, batch, size)

    def both() -> None:
        run()
        run()

    return {"held_bytes": held, "peak_bytes": _plan_memory.peak(both, CPU)}


def child(*words: str) -> Any:
    """The answer of this script in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all models, print a line each, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument(
        "--seconds", type=seconds, default=40.0, help="of exhaustive search, a model"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--model", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(window_peak(args.model, args.threads, args.peak_of)))
        return
    if args.model:
        print(json.dumps(search(args.model, args.threads, args.seconds)))
        return
    check_output(args.output, parser)
    threads = ("--threads", str(args.threads))
    found: dict[str, Any] = {"machine": machine.describe(), "threads": args.threads, "models": {}}
    for name in MODELS:
        one = child(*threads, "--seconds", str(args.seconds), "--model", name)
        plan = one["plan"]
        size = plan["micro_batch"]
        peaks = [child(*threads, "--model", name, "--peak-of", str(size)) for _ in range(3)]
        peaks.sort(key=lambda peak: peak["peak_bytes"])
        one["measured"] = peaks[1]
        above = [p["peak_bytes"] - p["held_bytes"] for p in (plan, peaks[1])]
        one["peak_error"] = plan["peak_bytes"] / peaks[1]["peak_bytes"] - 1
        one["peak_error_above_held"] = above[0] / above[1] - 1
        found["models"][name] = one
        print(
            f"{name:12} batch {plan['batch_size']:4} planned {size:4} best {one['best']:4}: "
            f"{one['share_of_best']:.1%} of the best throughput; peak {one['peak_error']:+.1%}, "
            f"above held {one['peak_error_above_held']:+.1%}",
            flush=True,
        )
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
