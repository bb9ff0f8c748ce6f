"""One optimisation batch, cut in several ways: what changes, in bits and in gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mbkern
from demo_parts.config import CUTS
from demo_parts.model import Loss, SmallLM, mbkern_mean, torch_mean, torch_sum
from demo_parts.text import IGNORE, Batch

METHODS: dict[str, Loss] = {
    "torch mean of means": torch_mean,
    "torch sum / items": torch_sum,
    "mbkern": mbkern_mean,
}
_ONES = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


def different_bits(a: Tensor, b: Tensor) -> tuple[int, int]:
    """The elements, and the bits, in which two fp32 tensors differ."""
    difference = a.contiguous().view(torch.int32) ^ b.contiguous().view(torch.int32)
    difference = difference[difference != 0]
    return difference.numel(), int(_ONES[difference.numpy().view(np.uint16)].sum())


def same_logits(
    logits: Tensor, targets: Tensor, rows: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Loss and gradient of fixed logits for every cut, against the same method's uncut result.

    ``rows`` is the number of rows of ``logits`` that belong to one sample.
    """
    items = int((targets != IGNORE).sum())
    results: dict[str, Any] = {
        "gradient_elements": items * logits.shape[1],
        "methods": {method: {} for method in METHODS},
    }
    for method in METHODS:
        reference, reference_loss = torch.empty_like(logits), torch.empty(())
        for cut, samples in CUTS.items():
            sizes = [size * rows for size in samples]
            loss, elements, bits = _LossOf(method, items), 0, 0
            pieces = zip(*(t.split(sizes) for t in (logits, targets, reference)), strict=True)
            for piece, target, uncut in pieces:
                grad = loss.add(piece, target, len(sizes))
                if len(sizes) == 1:
                    uncut.copy_(grad)
                differing = different_bits(grad, uncut)
                elements, bits = elements + differing[0], bits + differing[1]
            value = loss.value()
            if len(sizes) == 1:
                reference_loss = value
            results["methods"][method][cut] = {
                "loss": value.item(),
                "loss_bits_different": different_bits(value, reference_loss)[1],
                "gradient_elements_different": elements,
                "gradient_bits_different": bits,
            }
            tick()
    return results


class _LossOf:
    """The loss of a mini-batch, micro-batch by micro-batch, by one of the methods."""

    def __init__(self, method: str, items: int) -> None:
        self.items = items
        self.torch_loss = METHODS[method] if method != "mbkern" else None
        self.total = torch.zeros(())
        self.exact = mbkern.LossSum()

    def add(self, logits: Tensor, targets: Tensor, parts: int) -> Tensor:
        """Add a micro-batch; return the gradient of its logits."""
        if self.torch_loss is None:
            _, grad = mbkern.loss_and_grad(
                "cross_entropy", logits, targets, denominator=self.items, loss_sum=self.exact
            )
            return grad
        leaf = logits.detach().requires_grad_()
        loss = self.torch_loss(leaf, targets, self.items, parts)
        loss.backward()
        self.total += loss.detach()
        assert leaf.grad is not None
        return leaf.grad

    def value(self) -> Tensor:
        """The loss of all that was added."""
        return self.total if self.torch_loss is not None else self.exact.value(self.items)


def whole_model(model: SmallLM, batch: Batch, tick: Callable[[], None]) -> dict[str, Any]:
    """Relative error of the model's accumulated gradient, |g - g64| / |g64|, for every cut.

    g64 is the gradient of the uncut batch, computed with the model in fp64.
    """
    exact = _gradient(copy.deepcopy(model).double(), batch, CUTS["10x5"], torch_sum)
    tick()
    results: dict[str, Any] = {method: {} for method in METHODS}
    for method, loss in METHODS.items():
        for cut, sizes in CUTS.items():
            error = _gradient(model, batch, sizes, loss) - exact
            results[method][cut] = (error.norm() / exact.norm()).item()
            tick()
    return results


def _gradient(model: SmallLM, batch: Batch, sizes: tuple[int, ...], loss: Loss) -> Tensor:
    """The gradient of all parameters, accumulated over micro-batches, as one fp64 vector."""
    model.zero_grad()
    for part in batch.cut(sizes):
        loss(model(part.inputs), part.targets.flatten(), batch.items, len(sizes)).backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(grads)
