"""The self-test's cases of the fused head in split-invariant mode: the products' own kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbkern._loss_and_grad import loss_and_grad
from mbkern._loss_sum import LossSum
from mbkern._selftest_cases import Case, Outputs, cuts, integers, numbers

#: Shapes: (rows, features, classes). Blocks of the depth, tails of tiles, chunks of one row.
HEADS = [
    Case("head", (43, 37, 517), with_="bias weight ignored"),
    Case("head in small chunks", (19, 530, 70), with_="chunks z"),
    Case("head of one class", (9, 3, 1), with_="bias"),
    Case("head that is capped", (31, 65, 33), with_="softcap scale smoothing"),
]


def make(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of a case."""
    rows, features, classes = case.shape
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    target = integers(4, (rows,), classes)
    if "ignored" in case.with_:
        target[integers(5, (rows,), 4) == 0] = -100
    return {
        "input": numbers(1, (rows, features), dtype, 2.0),
        "linear_weight": numbers(2, (classes, features), dtype, 0.5),
        "target": target,
        "linear_bias": numbers(3, (classes,), dtype, 2.0),
        "weight": numbers(7, (classes,), wide, 2.0).abs(),
        "buffer": numbers(10, (classes, features), wide),
    }


def compute(case: Case, t: dict[str, Tensor], pieces: list[slice]) -> Outputs:
    """All outputs, the weight's and the bias's gradients added up over the pieces in place."""
    words = case.with_.split()
    names: tuple[str, ...] = ("input", "linear_weight")
    options: dict[str, Any] = {"split_invariant": True}
    buffers: list[Tensor | None] = [None, t["buffer"].clone()]
    if "bias" in words:
        options["linear_bias"] = t["linear_bias"]
        names += ("linear_bias",)
        buffers.append(torch.zeros_like(t["buffer"][:, 0]))
    extras: dict[str, tuple[str, Any]] = {
        "weight": ("weight", t["weight"]),
        "chunks": ("chunk_bytes", 8),
        "z": ("z_loss", 1e-3),
        "softcap": ("softcap", 7.0),
        "scale": ("logit_scale", 1.25),
        "smoothing": ("label_smoothing", 0.1),
    }
    options.update(extras[word] for word in words if word in extras)
    total = None if t["input"].dtype is torch.float64 else LossSum()
    losses, gradients = [], []
    for piece in pieces:
        loss, grads = loss_and_grad(
            "linear_cross_entropy", t["input"][piece], t["linear_weight"], t["target"][piece],
            argnums=names, grad_out=tuple(buffers), accumulate=True, reduction="none",
            loss_sum=total, **options,
        )  # fmt: skip
        losses.append(loss)
        gradients.append(grads[0])
    outputs = {"loss": torch.cat(losses), "gradient input": torch.cat(gradients)}
    for name, buffer in zip(names[1:], buffers[1:], strict=True):
        assert buffer is not None
        outputs[f"gradient {name}"] = buffer
    if total is not None:
        outputs["exact sum"] = total.state
    return outputs


__all__ = ["HEADS", "compute", "cuts", "make"]
