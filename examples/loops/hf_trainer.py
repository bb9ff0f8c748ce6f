"""Hugging Face's Trainer: the loss of each micro-batch divided by the tokens of all of them.

The Trainer counts the tokens of the accumulation steps beforehand (``num_items_in_batch``), and
leaves the division to ``compute_loss_func``. Over several processes it counts those of all with
``average_tokens_across_devices=True``, the default of its newer versions; without it the result is
a mean of the processes' means.

    pip install transformers accelerate
    python examples/loops/hf_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import tokens
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import mbkern.functional as M


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The micro-batch's part of the mean over all tokens of the mini-batch; None: its own mean.

    The labels here are the next tokens. Where they are the tokens themselves, as the Trainer's own
    models have them, compare ``outputs.logits[:, :-1]`` with ``labels[:, 1:]``; the Trainer counts
    the first label of a text, too, unless that is -100.
    """
    return M.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), denominator=num_items_in_batch
    )


def train(steps: int = 40, micro_batch: int = 6) -> list[float]:
    """Train, and return the loss of every mini-batch of 24 sentences."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokens.VOCABULARY, n_positions=tokens.LENGTH, n_embd=tokens.WIDTH, n_layer=1,
        n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    sentences = [
        {"input_ids": text, "labels": labels}
        for batch in tokens.batches(steps)
        for text, labels in zip(batch["tokens"], batch["labels"], strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            GPT2LMHeadModel(config),
            TrainingArguments(
                folder, per_device_train_batch_size=micro_batch, max_steps=steps, logging_steps=1,
                gradient_accumulation_steps=tokens.BATCH // micro_batch, learning_rate=0.01,
                use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no",
                disable_tqdm=True, train_sampling_strategy="sequential",
            ),
            train_dataset=sentences,  # type: ignore[arg-type]
            compute_loss_func=loss_of,
        )  # fmt: skip
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = train()
    print(f"loss of the first mini-batch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
