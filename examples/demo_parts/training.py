"""Train the language model with each loss, step by step in turn.

The losses take turns within one process, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from demo_parts.config import CUTS, Config
from demo_parts.model import LOSSES, Loss, SmallLM, new_model
from demo_parts.text import Batch, Text
from demo_parts.timing import summary


def accumulate(model: SmallLM, parts: Sequence[Batch], loss: Loss) -> tuple[float, float]:
    """Forward and backward of all micro-batches: their loss, and the seconds spent in it.

    These are the seconds of its forward and of its backward. Backward starts with the loss; a hook
    on the logits sees the moment when their gradient is there.
    """
    items = sum(part.items for part in parts)
    value = seconds = 0.0
    formed: list[float] = []
    for part in parts:
        logits = model(part.inputs)
        # Before the loss: torch 2.13 crashes if a view that was overwritten is given a hook.
        logits.register_hook(lambda _: formed.append(time.perf_counter()))
        start = time.perf_counter()
        result = loss(logits, part.targets.flatten(), items, len(parts))
        seconds += time.perf_counter() - start
        del logits  # or its memory, if nobody else needs it, would live through backward
        start = time.perf_counter()
        result.backward()
        seconds += formed.pop() - start
        value += result.item()
    return value, seconds


def train(text: Text, config: Config, tick: Callable[[], None]) -> tuple[dict[str, Any], SmallLM]:
    """Train one model a loss on the same batches; return the numbers, and mbkern's model."""
    vocabulary = int(text.facts["vocabulary"])
    models = {name: new_model(config, vocabulary) for name in LOSSES}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        for name, model in models.items()
    }
    generator = torch.Generator().manual_seed(config.seed)
    records: dict[str, list[tuple[float, float, float]]] = {name: [] for name in LOSSES}
    names = list(LOSSES)
    for number in range(config.steps):
        batch = text.window_batch(config.batch, generator)
        for name in names[number % 3 :] + names[: number % 3]:
            start = time.perf_counter()
            parts = batch.cut(CUTS[config.training_cut])
            value, loss_seconds = accumulate(models[name], parts, LOSSES[name])
            optimizers[name].step()
            optimizers[name].zero_grad()
            records[name].append((value, loss_seconds, time.perf_counter() - start))
            tick()
    results: dict[str, Any] = {}
    for name, record in records.items():
        curve, in_loss, in_step = zip(*record, strict=True)
        reference = [r[0] for r in records["torch"]]
        results[name] = {
            "curve": curve,
            "largest_relative_difference_to_torch": max(
                abs(a - b) / b for a, b in zip(curve, reference, strict=True)
            ),
            "loss_seconds": summary(in_loss[config.warmup_steps :]),
            "step_seconds": summary(in_step[config.warmup_steps :]),
        }
    return results, models["mbkern"]
