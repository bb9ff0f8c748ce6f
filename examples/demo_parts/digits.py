"""Handwritten digits: the smallest real example of training in micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from demo_parts.config import CUTS, Config
from demo_parts.cuts import same_logits
from demo_parts.model import Loss, mbkern_mean, torch_mean

_TRAINING = 1500  # images of 1797; the others are for the test


def run(config: Config) -> dict[str, Any]:
    """Train a perceptron with either library, in mini-batches cut 10x5; then compare cuts."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    images, labels = images[order], labels[order]
    results: dict[str, Any] = {"test_images": len(images) - _TRAINING, "test_accuracy": {}}
    for name, loss in (("torch", torch_mean), ("mbkern", mbkern_mean)):
        torch.manual_seed(config.seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        _fit(model, images[:_TRAINING], labels[:_TRAINING], loss, config)
        with torch.no_grad():
            correct = model(images[_TRAINING:]).argmax(1) == labels[_TRAINING:]
            logits = model(images[: config.batch])
        results["test_accuracy"][name] = correct.float().mean().item()
    results["same_logits"] = same_logits(logits, labels[: config.batch], 1, lambda: None)
    return results


def _fit(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, config: Config) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cut = list(CUTS["10x5"])
    for _ in range(config.digit_epochs):
        for x, y in zip(images.split(config.batch), labels.split(config.batch), strict=True):
            for part, target in zip(x.split(cut), y.split(cut), strict=True):
                loss(model(part), target, len(y), len(cut)).backward()
            optimizer.step()
            optimizer.zero_grad()
