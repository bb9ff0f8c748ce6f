"""What the loops in this folder train: a tiny language model, on sentences of uneven length.

A sentence counts upwards from a random number, in steps that its first token says; the rest is
padding. So a model that has learnt it knows the next token, and the number of tokens that count
differs from micro-batch to micro-batch: a mean of means would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, BATCH = 41, 32, 16, 24
PADDING = -100  # of labels


class Body(nn.Module):
    """From tokens (n, length) to hidden states (n, length, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.memory = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the recurrent network."""
        hidden: Tensor = self.memory(self.embedding(tokens))[0]
        return hidden


class Model(nn.Module):
    """From tokens to logits (n, length, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Body()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at every place."""
        logits: Tensor = self.head(self.body(tokens))
        return logits


def batches(steps: int, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    """Mini-batches of BATCH sentences: ``tokens``, and ``labels``, the tokens one place on."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        step = torch.randint(1, 5, (BATCH, 1), generator=g)
        start = torch.randint(8, VOCABULARY, (BATCH, 1), generator=g)
        places = torch.arange(LENGTH)
        text = 8 + (start - 8 + step * places) % (VOCABULARY - 8)
        text = torch.cat((step, text), 1)
        length = torch.randint(3, LENGTH + 1, (BATCH, 1), generator=g)
        labels = text[:, 1:].masked_fill(places >= length, PADDING)
        yield {"tokens": text[:, :-1].masked_fill(places >= length, 0), "labels": labels}
