"""What mbkern does, on real data and on this machine: ``python examples/demo.py``.

(a) scikit-learn's handwritten digits, and (b) a small language model on the source of Python's
standard library, tokenised with a vocabulary trained on the spot. Both are trained in micro-batches
with stock PyTorch and with mbkern. One batch of 50 is then cut as 1x50, 10x5, 50x1 and raggedly, to
see what changes; and the throughput is measured against the size of the micro-batch. Nothing is
downloaded.

Needs what ``pip install '.[demo]'`` brings. Writes ``demo.json`` (all numbers) and ``demo.png`` to
the folder given by ``--out``, and prints tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # asked for, so it does not warn

import torch
from demo_parts import cuts, digits, figure, memory, report, text, throughput, training
from demo_parts.config import CUTS, QUICK, Config, environment
from demo_parts.model import LOSSES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Tick = Callable[[], None]


def measure(config: Config, progress: Progress) -> dict[str, Any]:
    """Take all measurements, one after the other."""
    numbers: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def stage(name: str, ticks: int, run: Callable[[Tick], Any]) -> Any:
        task = progress.add_task(name, total=ticks)
        start = time.perf_counter()
        result = run(lambda: progress.advance(task))
        seconds[name] = time.perf_counter() - start
        progress.update(task, completed=ticks)
        return result

    numbers["digits"] = stage("digits", 1, lambda _: digits.run(config))
    source = stage(
        "text and vocabulary",
        1,
        lambda _: text.load(config.corpus_bytes, config.vocabulary, config.context),
    )
    numbers["text"] = source.facts
    vocabulary = int(source.facts["vocabulary"])
    numbers["training"], model = stage(
        "training", config.steps * len(LOSSES), lambda tick: training.train(source, config, tick)
    )
    numbers["peak_memory_mib"] = stage(
        "peak memory",
        len(LOSSES) * len(config.memory_cuts),
        lambda tick: memory.measure(config, vocabulary, tick),
    )

    generator = torch.Generator().manual_seed(config.seed)
    uneven = source.paragraph_batch(config.batch, config.context, generator)
    numbers["uneven_batch"] = {"items": uneven.items, "positions": uneven.targets.numel()}

    def cut_logits(tick: Tick) -> dict[str, Any]:
        with torch.no_grad():
            logits = model(uneven.inputs)
        return cuts.same_logits(logits, uneven.targets.flatten(), config.context, tick)

    combinations = len(cuts.METHODS) * len(CUTS)
    numbers["same_logits"] = stage("cuts of the same logits", combinations, cut_logits)
    numbers["model_gradient_error"] = stage(
        "cuts of the whole model",
        combinations + 1,
        lambda tick: cuts.whole_model(model, uneven, tick),
    )
    windows = source.window_batch(max(config.micro_batches), generator)
    numbers["throughput"] = stage(
        "throughput",
        config.rounds + 1,
        lambda tick: throughput.measure(model, windows, config, tick),
    )
    numbers["seconds"] = seconds
    return numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; return the exit status."""
    parser = argparse.ArgumentParser(description="Train with torch and with mbkern, and compare.")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # now, and not when all is measured
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    config = QUICK if options.quick else Config()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    given = sys.argv[1:] if arguments is None else arguments

    start = time.perf_counter()
    busy = os.getloadavg()[0]
    # A dumb terminal is not drawn on: rich would take 80 columns there, and leave letters out.
    terminal = False if os.environ.get("TERM") == "dumb" else None
    console = Console(force_terminal=terminal)
    name = TextColumn("{task.description:<24}")
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        measured = measure(config, progress)
    numbers = {
        "command": shlex.join(["python", "examples/demo.py", *given]),
        "environment": {**environment(), "load_average_before": busy},
        "config": dataclasses.asdict(config),
        "cuts": CUTS,
        **measured,
    }
    figure.draw(numbers, options.out / "demo.png")
    numbers["seconds"]["all"] = time.perf_counter() - start
    (options.out / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    report.show(numbers, Console(width=max(console.width, 130), force_terminal=terminal))
    console.print(
        f"{numbers['seconds']['all']:.0f} s in all. Wrote demo.png and demo.json to {options.out}/"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
