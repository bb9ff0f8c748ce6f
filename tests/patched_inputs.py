"""What the tests of mbkern.patched() share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as imported_cross_entropy
from torch.nn.functional import mse_loss as imported_mse_loss
from torch.testing._internal.common_methods_invocations import op_db

import mbkern

ORIGINALS = {"cross_entropy": imported_cross_entropy, "mse_loss": imported_mse_loss}
OURS = {name: getattr(mbkern.functional, name) for name in ORIGINALS}
OPS = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if op.name.startswith("nn.functional.") and not op.variant_test_name
}
every_loss = pytest.mark.parametrize("name", ORIGINALS)
every_way = pytest.mark.parametrize("mode", [False, True], ids=["wrapper", "mode"])

torch.manual_seed(0)
X = torch.randn(64, 37)
Y = torch.randn(64, 37)
T = torch.randint(37, (64,))
W = torch.rand(37) + 0.1
ARGUMENTS = {"cross_entropy": (X, T), "mse_loss": (X, Y)}


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A result, or the type and text of an error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b) and type(a) is type(b)


def by_torch(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The loss by torch, also inside a mode."""
    with torch._C.DisableTorchFunction():
        return ORIGINALS[name](*args, **kwargs)


def run_by(function: Callable[..., Tensor], *args: Tensor) -> str:
    """Which library's node a loss is the output of."""
    leaf = args[0].detach().clone().requires_grad_()
    node = type(function(leaf, *args[1:]).grad_fn).__name__
    return (
        "mbkern"
        if node.lstrip("_") in ("RowLossBackward", "TensorLossBackward", "PlainLossBackward")
        else "torch"
    )


def in_a_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(outcome(function)))
    thread.start()
    thread.join()
    return results[0]
