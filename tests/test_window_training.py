"""Models trained with mini-batches cut in three ways end with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mbkern

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
CUTS = [[48], [12] * 4, [1, 30, 17]]
STEPS = 40


class Characters(torch.nn.Module):
    """The next character of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(128, 12)
        self.body = torch.nn.GRU(12, 20, batch_first=True)
        self.head = torch.nn.Linear(20, 128)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(ids))[0])
        return logits


def digits() -> list[tuple[Tensor, Tensor]]:
    """Handwritten digits; every fifth label is unknown."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(images), generator=g)[: 48 * STEPS]
    order = order.repeat(2)[: 48 * STEPS]
    x, y = torch.tensor(images)[order] / 16, torch.tensor(labels)[order].long()
    y[::5] = -100
    return list(zip(x.split(48), y.split(48), strict=True))


def text() -> list[tuple[Tensor, Tensor]]:
    """Lines of source text, padded: rows have from 5 to 24 characters that count."""
    found = torch.tensor(list(Path(F.__file__).read_bytes()[: 48 * STEPS * 25])).clamp(max=127)
    ids = found[: 48 * STEPS * 25].view(-1, 25)
    target = ids[:, 1:].clone()
    lengths = 5 + torch.arange(len(ids)) * 7 % 20
    target[torch.arange(24) >= lengths[:, None]] = -100
    return list(zip(ids[:, :-1].split(48), target.split(48), strict=True))


def train(kind: str, dtype: torch.dtype, cut: list[int]) -> list[Tensor]:
    torch.manual_seed(3)
    if kind == "digits":
        model: torch.nn.Module = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )
    else:
        model = Characters()
    model = model.to(dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    accumulator = mbkern.GradAccumulator(model, l2=1e-4, max_norm=1.0)
    for x, y in digits() if kind == "digits" else text():
        for a, b in zip(x.split(cut), y.split(cut), strict=True):
            z = model(a.to(dtype) if a.is_floating_point() else a)
            loss = F.cross_entropy(z.reshape(-1, z.shape[-1]), b.reshape(-1), reduction="sum")
            accumulator.backward(loss, count=(b != -100).sum())
        accumulator.flush()
        optimiser.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["digits", "text"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-3)])
def test_same_weights(kind: str, dtype: torch.dtype, bound: float) -> None:
    """In fp64 to rounding. In fp32 the layers below round each micro-batch in their own way, 1e-7
    of a gradient; 40 steps with momentum let that grow by a few orders."""
    whole, *others = [train(kind, dtype, cut) for cut in CUTS]
    for other in others:
        for a, b in zip(other, whole, strict=True):
            assert (a - b).abs().max() <= bound * b.abs().max()
