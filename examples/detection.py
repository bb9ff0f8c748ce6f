"""An imbalanced task as in detection: 1 of 50 candidates is an object; focal loss finds it.

Candidates are points whose features overlap; a network scores them by logits. It is trained twice
from the same seed by sigmoid focal loss: with mbkern, in place over the logits and in
micro-batches, and with torch operations. Plain cross-entropy stands beside them.

    pip install '.[demo]'
    python examples/detection.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

import mbkern.functional as M

CANDIDATES, FEATURES, RARE = 20000, 16, 0.02
BATCH, MICRO_BATCH = 2000, 250
Objective = Callable[[Tensor, Tensor, int], Tensor]  # logits, target, items of the mini-batch


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Features of candidates, and whether each is an object."""
    random = torch.Generator().manual_seed(seed)
    target = (torch.rand(CANDIDATES, 1, generator=random) < RARE).float()
    x = torch.randn(CANDIDATES, FEATURES, generator=random)
    radius = x[:, :4].norm(dim=1, keepdim=True)
    return torch.cat((x, radius - 2), 1) + 0.9 * target, target


def focal(logits: Tensor, target: Tensor, items: int) -> Tensor:
    """The part of the mini-batch's mean that this micro-batch makes, over the logits."""
    return M.sigmoid_focal_loss(
        logits, target, reduction="mean", denominator=float(items), inplace=True
    )


def torch_focal(logits: Tensor, target: Tensor, items: int) -> Tensor:
    """The same by torch operations."""
    p = torch.sigmoid(logits)
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    q = p * (1 - target) + (1 - p) * target
    return ((0.25 * target + 0.75 * (1 - target)) * q**2 * ce).sum() / items


def cross_entropy(logits: Tensor, target: Tensor, items: int) -> Tensor:
    """Without focus on the hard candidates."""
    return M.binary_cross_entropy_with_logits(logits, target, denominator=float(items))


def train(objective: Objective, micro_batch: int, epochs: int) -> float:
    """Train a network with two layers; return its average precision on other candidates."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES + 1, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, target = data(0)
    random = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(CANDIDATES, generator=random).split(BATCH):
            for part in rows.split(micro_batch):
                objective(model(x[part]), target[part], len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()
    x, target = data(2)
    with torch.no_grad():
        return float(average_precision_score(target[:, 0].numpy(), model(x)[:, 0].numpy()))


def run(epochs: int) -> dict[str, float]:
    """Average precision of focal loss by mbkern and by torch, and of cross-entropy."""
    return {
        "focal loss, mbkern": train(focal, MICRO_BATCH, epochs),
        "focal loss, torch": train(torch_focal, BATCH, epochs),
        "cross-entropy, mbkern": train(cross_entropy, MICRO_BATCH, epochs),
    }


def main() -> None:
    """Print the average precision of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    for name, precision in run(parser.parse_args().epochs).items():
        print(f"{name:24} {precision:.4f}")


if __name__ == "__main__":
    main()
