"""The fastest loop: the head's loss and gradients in one go, without logits and without autograd.

The body runs as usual. The head adds its weight's gradient straight into the accumulator's buffer,
and returns that of the hidden states, from which autograd goes on: three matrix products, where an
ordinary backward of a fused head takes four.

    python examples/loops/fastest.py
"""

from __future__ import annotations

import tokens
import torch

import mbkern


def train(steps: int = 60, micro_batch: int = 5) -> list[float]:
    """Train, and return the loss of every mini-batch."""
    model = tokens.Model()
    weight = model.head.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    accumulator = mbkern.GradAccumulator(model, max_norm=1.0)
    history = []
    for batch in tokens.batches(steps):
        total = torch.zeros(())
        for part in mbkern.micro_batches(batch, micro_batch):
            labels = part["labels"]
            hidden = model.body(part["tokens"])
            with accumulator.micro_batch(count=(labels != tokens.PADDING).sum()):
                loss, (gradient, _) = mbkern.loss_and_grad(
                    "linear_cross_entropy", hidden.detach(), weight.detach(), labels,
                    argnums=("input", "linear_weight"), reduction="sum",
                    grad_out=(None, accumulator.buffer(weight)), accumulate=True,
                )  # fmt: skip
                hidden.backward(gradient)
            total += loss
        stats = accumulator.flush()
        optimizer.step()
        history.append(float(total / stats.counts[""]))
    return history


if __name__ == "__main__":
    losses = train()
    print(f"loss of the first mini-batch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
