"""The plain loop: any model, exact mini-batches out of micro-batches of any size.

python examples/loops/plain.py
"""

from __future__ import annotations

import tokens
import torch

import mbkern
import mbkern.functional as M


def train(steps: int = 60, micro_batch: int = 5) -> list[float]:
    """Train, and return the loss of every mini-batch."""
    model = tokens.Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    accumulator = mbkern.GradAccumulator(model, max_norm=1.0)
    history = []
    for batch in tokens.batches(steps):
        total = torch.zeros(())
        for part in mbkern.micro_batches(batch, micro_batch):
            labels = part["labels"]
            logits = model(part["tokens"])
            # A sum, not a mean: what it is divided by is known when the mini-batch ends.
            loss = M.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            accumulator.backward(loss, count=(labels != tokens.PADDING).sum())
            total += loss.detach()
        stats = accumulator.flush()  # the gradients of the mean over all tokens
        optimizer.step()
        history.append(float(total / stats.counts[""]))
    return history


if __name__ == "__main__":
    losses = train()
    print(f"loss of the first mini-batch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
