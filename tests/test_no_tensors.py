"""What is no tensor is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mbkern import functional as F

X = torch.linspace(0.1, 0.9, 12).reshape(3, 4)
INDICES, LABELS = torch.tensor([0, 2, 1]), torch.ones(3, 4)
#: Of each kind, what comes with a tensor that is none.
CALLS: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "cross_entropy": (X, INDICES),
    "half_squared_error": (X, X),
    "mse_loss": (X, X),
    "binary_cross_entropy_with_logits": (X, X),
    "soft_margin_loss": (X, LABELS),
    "nll_loss": (X, INDICES),
}


@pytest.mark.parametrize("bad", [None, [1.0], 3], ids=["None", "list", "int"])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("name", CALLS)
def test_arguments(name: str, position: int, bad: Any) -> None:
    for with_graph in (False, True):
        tensors: list[Any] = list(CALLS[name])
        tensors[0] = tensors[0].clone().requires_grad_(with_graph)
        tensors[position] = bad
        argument = ("input", "target")[position]
        with pytest.raises(TypeError, match=f"^mbkern: {name}: {argument} must be a tensor, not "):
            getattr(F, name)(*tensors)


def test_arrays() -> None:
    for position, argument in enumerate(("input", "target")):
        tensors: list[Any] = [X, INDICES]
        tensors[position] = tensors[position].numpy()
        with pytest.raises(TypeError, match=f"cross_entropy: {argument} must be a tensor, not nd"):
            F.cross_entropy(*tensors)


def test_hints() -> None:
    x = X.clone().requires_grad_()
    target = torch.tensor([0, 2, 1])
    F.cross_entropy(x, target, grad_scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"^mbkern: grad_scale must be a number or a .*not \(3,\)"):
        F.cross_entropy(x, target, grad_scale=torch.ones(3))
