"""A small causal transformer, and the ways to compute its loss that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbkern
from demo_parts.config import Config


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each after a layer norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, context, width) to the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class SmallLM(nn.Module):
    """Embedding, blocks, and a head that shares the embedding's weight."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        blocks = (Block(config.width, config.heads) for _ in range(config.layers))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(config.width)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=1 / math.sqrt(config.width) / 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token ids (n, context) to logits (n * context, vocabulary)."""
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        return F.linear(self.norm(self.blocks(x)).flatten(0, 1), self.token.weight)


def new_model(config: Config, vocabulary: int) -> SmallLM:
    """The model with the weights that belong to the seed."""
    torch.manual_seed(config.seed)
    return SmallLM(config, vocabulary)


# A micro-batch's share of the mini-batch's loss, from its logits, its targets (flat), the number
# of items in the mini-batch, and the number of micro-batches.
Loss = Callable[[Tensor, Tensor, int, int], Tensor]


def torch_mean(logits: Tensor, targets: Tensor, items: int, parts: int) -> Tensor:
    """torch, the usual way: the mean of the micro-batch over the number of micro-batches."""
    return F.cross_entropy(logits, targets) / parts


def torch_sum(logits: Tensor, targets: Tensor, items: int, parts: int) -> Tensor:
    """torch, with care: the sum over the items of the mini-batch."""
    return F.cross_entropy(logits, targets, reduction="sum") / items


def mbkern_mean(logits: Tensor, targets: Tensor, items: int, parts: int) -> Tensor:
    """mbkern: one denominator, that of the mini-batch."""
    return mbkern.functional.cross_entropy(logits, targets, denominator=items)


def mbkern_inplace(logits: Tensor, targets: Tensor, items: int, parts: int) -> Tensor:
    """mbkern: the same, with the gradient written over the logits."""
    return mbkern.functional.cross_entropy(logits, targets, denominator=items, inplace=True)


LOSSES: dict[str, Loss] = {
    "torch": torch_mean,
    "mbkern": mbkern_mean,
    "mbkern in place": mbkern_inplace,
}
