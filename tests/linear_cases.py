"""The fused head's arguments in all their forms, and what they should give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass
class Head:
    """One set of arguments.

    Attributes:
        leading: 1 or 2 leading dimensions of the input.
        scale: a number, or True: a tensor that requires grad.
    """

    reduction: str = "mean"
    inner: tuple[int, ...] = ()
    leading: int = 1
    shift: int = 0
    smoothing: float = 0.0
    probabilities: bool = False
    class_weight: bool = False
    sample_weight: bool = False
    bias: bool = True
    ignored: bool = False
    scale: float | bool | None = None
    z_loss: float = 0.0
    softcap: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments, those that torch differentiates as leaves."""
        g = torch.Generator().manual_seed(17)
        rows, length, features, classes = 3, 7, 5, 11
        batch = (rows, length) if self.leading == 2 else (rows * length,)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        if self.probabilities:
            target = numbers(*batch, classes, *self.inner).softmax(len(batch))
        else:
            target = torch.randint(classes, (*batch, *self.inner), generator=g)
            if self.ignored:
                target.view(-1)[::3] = -100
        scale: Any = self.scale
        if scale is True:
            scale = torch.tensor(0.7, dtype=dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        shape = [*batch, *self.inner]
        shape[len(batch) - 1] -= self.shift
        return {
            "input": numbers(*batch, features).requires_grad_(),
            "linear_weight": numbers(classes, *self.inner, features).requires_grad_(),
            "target": target,
            "linear_bias": numbers(classes, *self.inner).requires_grad_() if self.bias else None,
            "weight": torch.rand(classes, generator=g).to(dtype) if self.class_weight else None,
            "sample_weight": (
                torch.rand(shape, generator=g).to(wide) if self.sample_weight else None
            ),
            "logit_scale": scale,
        }

    def options(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction, "label_smoothing": self.smoothing, "shift": self.shift,
            "z_loss": self.z_loss, "softcap": self.softcap, **self.more,
        }  # fmt: skip

    def expected(self, t: dict[str, Any]) -> Tensor:
        """By torch, in float64."""
        x, w = t["input"].double(), t["linear_weight"].double()
        bias, target, scale = t["linear_bias"], t["target"], t["logit_scale"]
        flat_bias = None if bias is None else bias.double().reshape(-1)
        z = TF.linear(x, w.reshape(-1, w.shape[-1]), flat_bias)
        if scale is not None:
            z = z * (scale.double() if isinstance(scale, Tensor) else scale)
        along = x.dim() - 2
        if self.shift:
            z = z.narrow(along, 0, z.shape[along] - self.shift)
            target = target.narrow(along, self.shift, target.shape[along] - self.shift)
        batch, classes = z.shape[:-1], w.shape[0]
        z = z.reshape(-1, classes, *self.inner)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        columns = (classes,) if self.probabilities else ()
        target = target.reshape(-1, *columns, *self.inner)
        if self.probabilities:
            target = target.double()
        weight = None if t["weight"] is None else t["weight"].double()
        plain: dict[str, Any] = {"weight": weight, "label_smoothing": self.smoothing}
        losses = TF.cross_entropy(z, target, reduction="none", **plain)
        counts = torch.ones_like(losses)
        if not self.probabilities:
            counts = (target != -100).double()
            if weight is not None:
                counts = counts * weight[target.clamp(min=0)]
        if self.z_loss:
            extra = self.z_loss * z.logsumexp(1) ** 2
            losses = losses + (extra if self.probabilities else extra * (target != -100))
        if t["sample_weight"] is not None:
            s = t["sample_weight"].double().reshape(losses.shape)
            losses, counts = losses * s, counts * s
        if self.reduction == "none":
            return losses.reshape(*batch, *self.inner)
        return losses.sum() / counts.sum() if self.reduction == "mean" else losses.sum()


def heads() -> Iterator[Head]:
    """Settings that meet every branch."""
    for reduction in ("mean", "sum", "none"):
        for inner in ((), (2,), (2, 3)):
            for ignored in (False, True):
                yield Head(reduction, inner, 1 + ignored, ignored=ignored)
                yield Head(
                    reduction, inner, 2 - ignored, ignored=ignored, class_weight=True,
                    smoothing=0.1, sample_weight=True,
                )  # fmt: skip
            yield Head(reduction, inner, 2, shift=1, ignored=True, sample_weight=True)
            yield Head(reduction, inner, probabilities=True, class_weight=True, smoothing=0.2)
        yield Head(reduction, leading=2, shift=2)
        yield Head(reduction, z_loss=0.01, softcap=2.0)
        yield Head(reduction, scale=1.7, bias=False)
        yield Head(reduction, scale=True)
        yield Head(reduction, scale=True, ignored=True, bias=False, softcap=3.0)


def leaves(t: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments that require grad, by name."""
    return {k: v for k, v in t.items() if isinstance(v, Tensor) and v.requires_grad}


def limit(name: str, dtype: torch.dtype) -> float:
    """Relative to the largest element. A logit scale's gradient is one sum of both signs."""
    return LIMITS[dtype] * (8 if name == "logit_scale" else 1)


def check(got: Tensor, want: Tensor, what: Any, most: float) -> None:
    assert got.shape == want.shape, what
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(1e-30)
        assert error <= most, (what, float(error), most)
