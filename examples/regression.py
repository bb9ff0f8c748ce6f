"""Tabular regression: Huber loss and three quantiles on scikit-learn's diabetes data.

A small network predicts the progression of the disease; a second one its 10 %, 50 % and 90 %
quantiles, by one pinball loss each. Both are trained twice from the same seed: with mbkern, in
micro-batches, and with torch, in whole mini-batches. The metrics agree.

    pip install '.[demo]'
    python examples/regression.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

import mbkern.functional as M

QUANTILES = (0.1, 0.5, 0.9)
BATCH, MICRO_BATCH = 64, 16
Objective = Callable[[Tensor, Tensor, int], Tensor]  # prediction, target, items of the mini-batch


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and targets of 342 patients to learn from, and of 100 others; standardised."""
    features, target = load_diabetes(return_X_y=True, scaled=True)
    x = torch.from_numpy(features).float() * 21.0  # unit variance
    y = torch.from_numpy(target).float()
    y = (y - y.mean()) / y.std()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order, None]
    return x[:342], y[:342], x[342:], y[342:]


def huber(prediction: Tensor, target: Tensor, items: int) -> Tensor:
    """The part of the mini-batch's mean that this micro-batch makes."""
    return M.huber_loss(prediction, target, delta=1.0, denominator=float(items))


def torch_huber(prediction: Tensor, target: Tensor, items: int) -> Tensor:
    """The same by torch, over a whole mini-batch."""
    return torch.nn.functional.huber_loss(prediction, target, delta=1.0)


def quantiles(prediction: Tensor, target: Tensor, items: int) -> Tensor:
    """The sum of the three pinball losses."""
    parts = [
        M.quantile_loss(prediction[:, [k]], target, q, denominator=float(items))
        for k, q in enumerate(QUANTILES)
    ]
    return torch.stack(parts).sum()


def torch_quantiles(prediction: Tensor, target: Tensor, items: int) -> Tensor:
    """The same by torch operations."""
    rest = target - prediction
    q = torch.tensor(QUANTILES)
    return torch.maximum(q * rest, (q - 1) * rest).mean(0).sum()


def train(outputs: int, objective: Objective, micro_batch: int, epochs: int) -> torch.nn.Module:
    """Train a network with two layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, outputs)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    x, y, _, _ = data()
    random = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=random).split(BATCH):
            for part in rows.split(micro_batch):
                objective(model(x[part]), y[part], len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def run(epochs: int) -> dict[str, tuple[float, float]]:
    """Metrics on the patients left out, by mbkern and by torch."""
    _, _, x, y = data()
    found = {}
    with torch.no_grad():
        models = [
            train_with_grad(1, huber, MICRO_BATCH, epochs),
            train_with_grad(1, torch_huber, BATCH, epochs),
        ]
        errors = [float((model(x) - y).abs().mean()) for model in models]
        found["mean absolute error"] = (errors[0], errors[1])
        models = [
            train_with_grad(3, quantiles, MICRO_BATCH, epochs),
            train_with_grad(3, torch_quantiles, BATCH, epochs),
        ]
        for k, q in enumerate(QUANTILES):
            shares = [float((y[:, 0] <= model(x)[:, k]).float().mean()) for model in models]
            found[f"share below the {q:.0%} quantile"] = (shares[0], shares[1])
    return found


def train_with_grad(
    outputs: int, objective: Objective, micro_batch: int, epochs: int
) -> torch.nn.Module:
    """Train inside a block that needs no gradients."""
    with torch.enable_grad():
        return train(outputs, objective, micro_batch, epochs)


def main() -> None:
    """Print the metrics of both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    print(f"{'':32} {'mbkern':>8} {'torch':>8}")
    for name, (ours, theirs) in run(parser.parse_args().epochs).items():
        print(f"{name:32} {ours:8.4f} {theirs:8.4f}")


if __name__ == "__main__":
    main()
