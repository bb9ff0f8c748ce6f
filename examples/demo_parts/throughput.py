"""Samples a second against the size of the micro-batch, of the loss alone and of the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from demo_parts.config import Config
from demo_parts.model import SmallLM, mbkern_mean, torch_mean
from demo_parts.text import Batch
from demo_parts.timing import summary

LIBRARIES = {"torch": torch_mean, "mbkern": mbkern_mean}


def measure(
    model: SmallLM, batch: Batch, config: Config, tick: Callable[[], None]
) -> dict[str, Any]:
    """Sequences a second for each kind ("function", "gradient"), library and micro-batch size.

    "function" is the forward of the loss alone on given logits; "gradient" is forward and backward
    of the whole model, without the optimiser. All take turns in every round; small sizes are
    repeated within one, to be long enough to time.
    """
    with torch.no_grad():
        logits = model(batch.inputs)
    rates: dict[tuple[str, str, int], list[float]] = {}
    for number in range(config.rounds + 1):
        for size in config.micro_batches:
            part = Batch(*(t[:size] for t in batch))
            for library in LIBRARIES:
                for kind in ("function", "gradient"):
                    rate = _rate(kind, library, model, part, logits[: part.inputs.numel()])
                    if number > 0:  # the first round warms up
                        rates.setdefault((kind, library, size), []).append(rate)
        model.zero_grad()
        tick()
    results: dict[str, Any] = {}
    for kind in ("function", "gradient"):
        results[kind] = {}
        for library in LIBRARIES:
            curve = {size: summary(rates[kind, library, size]) for size in config.micro_batches}
            results[kind][library] = {
                "sequences_per_second": curve,
                "knee": knee(curve, config.knee),
            }
    return results


def knee(curve: dict[int, dict[str, float]], share: float) -> int:
    """The smallest micro-batch that reaches the given share of the best throughput."""
    best = max(point["median"] for point in curve.values())
    return min(size for size, point in curve.items() if point["median"] >= share * best)


def _rate(kind: str, library: str, model: SmallLM, part: Batch, logits: torch.Tensor) -> float:
    loss = LIBRARIES[library]
    size, items, targets = len(part.inputs), part.items, part.targets.flatten()
    calls = max(1, 8 // size)
    start = time.perf_counter()
    for _ in range(calls):
        if kind == "gradient":
            loss(model(part.inputs), targets, items, 1).backward()
        else:
            with torch.no_grad():
                loss(logits, targets, items, 1)
    return calls * size / (time.perf_counter() - start)
