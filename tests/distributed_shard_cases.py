"""Calls of the fused head in one process, and their parts where ranks have the classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mbkern import functional as F

FEATURES = 8
SIZES = {2: (30, 7), 4: (3, 16, 0, 18)}  # of the ranks' classes: uneven, one empty
Case = dict[str, Any]


def cases() -> Iterator[tuple[str, Case]]:
    """Names, and the options of each call."""
    yield "mean", {}
    yield "sum", {"reduction": "sum"}
    yield "none", {"reduction": "none"}
    yield "bias", {"bias": True}
    yield "float64", {"dtype": torch.float64, "bias": True, "label_smoothing": 0.1}
    yield "bfloat16", {"dtype": torch.bfloat16, "bias": True}
    yield "float16", {"dtype": torch.float16}
    yield "smoothing", {"label_smoothing": 0.2}
    yield "class weights", {"weighted": True}
    yield "class weights, smoothing", {"weighted": True, "label_smoothing": 0.3, "bias": True}
    yield "z-loss", {"z_loss": 0.02, "weighted": True, "label_smoothing": 0.1}
    yield "soft cap", {"softcap": 2.0}
    yield "soft cap, everything", {
        "softcap": 3.0, "weighted": True, "label_smoothing": 0.1, "z_loss": 0.01, "bias": True,
        "sampled": True, "reduction": "none",
    }  # fmt: skip
    yield "scale", {"logit_scale": 0.7, "bias": True}
    yield "learnt scale", {"scale": True, "bias": True}
    yield "sample weights", {"sampled": True}
    yield "denominator", {"denominator": 3.5}
    yield "chunks", {"chunk_bytes": 500}
    yield "three dimensions, shift", {"shape": (2, 6), "shift": 1}
    yield "inner dimensions", {"shape": (6,), "inner": (3,), "chunk_bytes": 300}
    yield "one item", {"shape": ()}
    yield "no item", {"shape": (0,), "reduction": "sum"}
    yield "no item, none", {"shape": (0,), "reduction": "none"}
    yield "all ignored", {"ignored": True, "reduction": "sum"}
    yield "all ignored, none", {"ignored": True, "reduction": "none"}
    yield "filter", {"filter_eps": 1e-9, "logit_scale": 1e-3, "chunk_bytes": 500}
    yield "certain", {"gain": 60.0}
    yield "an ignored class", {"ignore_index": 4}


def make(case: Case) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The tensors and the options of a call in one process, the same on every rank."""
    g = torch.Generator().manual_seed(5)
    options = dict(case)
    dtype = options.pop("dtype", torch.float32)
    shape, inner = options.pop("shape", (12,)), options.pop("inner", ())
    gain = options.pop("gain", 1.0)
    classes = sum(SIZES[2])
    x = torch.randn(*shape, FEATURES, generator=g)
    w = torch.randn(classes, *inner, FEATURES, generator=g) * gain
    target = torch.randint(classes, (*shape, *inner), generator=g)
    if target.numel() > 2:
        target.view(-1)[1] = options.get("ignore_index", -100)
    if options.pop("ignored", False):
        target.fill_(-100)
    tensors: dict[str, Tensor | None] = {
        "input": x.to(dtype), "linear_weight": w.to(dtype), "linear_bias": None,
        "logit_scale": None, "target": target,
    }  # fmt: skip
    if options.pop("bias", False):
        tensors["linear_bias"] = torch.randn(classes, *inner, generator=g).to(dtype)
    if options.pop("scale", False):
        tensors["logit_scale"] = torch.tensor(1.3, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if options.pop("weighted", False):
        options["weight"] = torch.rand(classes, generator=g).to(wide)
    if options.pop("sampled", False):
        options["sample_weight"] = torch.rand(target.shape, generator=g).to(wide)
    return tensors, options


def run(
    tensors: dict[str, Tensor | None], options: dict[str, Any], **more: Any
) -> tuple[dict[str, Tensor], Any]:
    """Loss and gradients by name; and the statistics, if there are."""
    leaves: dict[str, Any] = {
        name: t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
        for name, t in tensors.items()
    }
    arguments = {name: t for name, t in leaves.items() if t is not None}
    result = F.linear_cross_entropy(**arguments, **options, **more)
    loss, stats = result if isinstance(result, tuple) else (result, None)
    generator = torch.Generator().manual_seed(6)
    incoming = torch.rand(loss.shape, generator=generator).to(loss.dtype)
    if options.get("split_invariant") or more.get("split_invariant"):
        # One process forms the gradients in forward, and multiplies them again, and rounds.
        incoming = torch.ones_like(loss) if loss.dim() == 0 else incoming
    value = (loss * incoming).sum()
    if stats is not None:
        value = value + (stats.lse.float() ** 2).sum() * 0.1
    value.backward()
    found = {name: t.grad for name, t in leaves.items() if t is not None and t.requires_grad}
    return {"loss": loss.detach(), **found}, stats


def part(tensor: Tensor | None, rank: int, world: int) -> Tensor | None:
    """A rank's classes."""
    if tensor is None:
        return None
    first = sum(SIZES[world][:rank])
    return tensor[first : first + SIZES[world][rank]].clone()


def close(name: str, found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Two results of one sum in another order."""
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2,
                 torch.float16: 2e-3}[dtype]  # fmt: skip
    scale = float(want.detach().abs().nan_to_num().max()) if want.numel() else 0.0
    torch.testing.assert_close(
        found,
        want,
        rtol=tolerance,
        atol=tolerance * max(scale, 1e-3),
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def refused(kind: type[Exception], call: Callable[[], Any], text: str) -> None:
    """What must be an error, on every rank."""
    with pytest.raises(kind, match=re.escape(text)):
        call()
