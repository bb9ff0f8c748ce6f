"""Accelerate: it places model and data; mbkern counts and accumulates.

For one process, or several under DistributedDataParallel; in fp16, too. Not for DeepSpeed, which
steps in ``accelerator.backward``, nor for Megatron-LM.

pip install accelerate
accelerate launch examples/loops/accelerate_loop.py
"""

from __future__ import annotations

import tokens
import torch
from accelerate import Accelerator

import mbkern
import mbkern.functional as M


def train(steps: int = 60, micro_batch: int = 5) -> list[float]:
    """Train on this process's share, and return the loss of every mini-batch."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.gradient_accumulation_steps != 1:  # perhaps by `accelerate launch`
        raise SystemExit("gradient_accumulation_steps must be 1: backward() divides losses by it")
    model = tokens.Model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02))
    # After prepare: a DistributedDataParallel module brings its process group.
    accumulator = mbkern.GradAccumulator(model, max_norm=1.0)
    rank, world = accelerator.process_index, accelerator.num_processes
    history = []
    for batch in tokens.batches(steps):
        share = {k: v[rank::world].to(accelerator.device) for k, v in batch.items()}
        total = torch.zeros((), device=accelerator.device)
        for part in mbkern.micro_batches(share, micro_batch):
            labels = part["labels"]
            with accelerator.no_sync(model):
                logits = model(part["tokens"])
                loss = M.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                with accumulator.micro_batch(count=(labels != tokens.PADDING).sum()):
                    accelerator.backward(loss)
            total += loss.detach()
        # In fp16 there is a scaler: its scale is divided out before the gradient is clipped.
        stats = accumulator.flush(accelerator.scaler, optimizer.optimizer)
        optimizer.step()
        total = accelerator.reduce(total)
        history.append(float(total / stats.counts[""]))
    return history


if __name__ == "__main__":
    losses = train()
    print(f"loss of the first mini-batch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
