"""``torch.fx.symbolic_trace`` makes a node of a loss, as it does of torch's."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, fx, nn

import mbkern
from mbkern import functional


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = mbkern.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(x * 2, y, z_loss=0.5) + self.loss(x, y) + x.sum()


def test_a_traced_model_computes_the_same() -> None:
    traced = fx.symbolic_trace(fx.symbolic_trace(_Model()))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets.count(functional.cross_entropy) == 2
    x, y = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    got, want = traced(x, y), _Model()(x, y)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (got, want)))


# The one left out is torch's own function.
OURS = [name for name in functional.__all__ if name != "triplet_margin_with_distance_loss"]


@pytest.mark.parametrize("name", OURS)
def test_every_loss_is_a_node(name: str) -> None:
    """As torch's own: what it is given is not looked at."""
    function = getattr(functional, name)
    needed = [
        p for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value: Tensor = getattr(functional, name)(*[x + k for k in range(len(needed))])
            return value

    graph = fx.symbolic_trace(Model()).graph
    assert function in [node.target for node in graph.nodes]
