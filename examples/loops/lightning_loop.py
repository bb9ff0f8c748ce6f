"""Lightning, with manual optimisation: a training step is a mini-batch, cut by mbkern.

For one device, in full precision or bf16: in "16-mixed" losses are scaled in ``manual_backward``,
and unscaled no sooner than in ``step``, when the accumulator has clipped the scaled gradient.

pip install lightning
python examples/loops/lightning_loop.py
"""

from __future__ import annotations

import lightning
import tokens
import torch
from torch import Tensor

import mbkern
import mbkern.functional as M


class Training(lightning.LightningModule):
    """The model, and how it is trained."""

    def __init__(self, micro_batch: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = tokens.Model()
        self.micro_batch = micro_batch
        self.history: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Once the parameters are where they stay."""
        self.accumulator = mbkern.GradAccumulator(self.model, max_norm=1.0)
        return torch.optim.AdamW(self.model.parameters(), lr=0.02)

    def training_step(self, batch: dict[str, Tensor]) -> None:
        """All micro-batches of a mini-batch."""
        optimizer = self.optimizers()
        total = torch.zeros((), device=self.device)
        for part in mbkern.micro_batches(batch, self.micro_batch):
            labels = part["labels"]
            logits = self.model(part["tokens"])
            loss = M.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            with self.accumulator.micro_batch(count=(labels != tokens.PADDING).sum()):
                self.manual_backward(loss)
            total += loss.detach()
        stats = self.accumulator.flush()
        optimizer.step()
        self.history.append(float(total / stats.counts[""]))


def train(steps: int = 60, micro_batch: int = 5) -> list[float]:
    """Train, and return the loss of every mini-batch."""
    training = Training(micro_batch)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="auto", devices=1,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(list(tokens.batches(steps)), batch_size=None)
    trainer.fit(training, data)
    return training.history


if __name__ == "__main__":
    losses = train()
    print(f"loss of the first mini-batch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
