"""The self-test's cases of accumulation and flush: lists of tensors, many of them odd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbkern._accumulate import accumulate_
from mbkern._flush import flush_
from mbkern._selftest_cases import FORMATS, Case, Outputs, numbers, special_values

#: Names of cases; with_: words of what is asked for.
LISTS = [
    Case("added", (), with_=""),
    Case("added with factors, measured", (), with_="factors measure"),
    Case("special values", (), with_="special measure"),
    Case("added into pairs of bfloat16", (), with_="pairs factors measure"),
    Case("added into bfloat16 by chance", (), with_="chance factors"),
    Case("flushed", (), with_="flush"),
    Case("pairs of bfloat16 flushed", (), with_="flush pairs"),
    Case("flushed and clipped", (), with_="flush clip penalties"),
]
_SHAPES: list[tuple[int, ...]] = [(1,), (33, 17), (20011,), (0,), (5, 7, 3, 3), (4096,), (255,), ()]


def make(case: Case, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Gradients of ``dtype``, buffers of full precision or of bfloat16, and parameters."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    grads = [numbers(20 + k, shape, dtype, 2.0) for k, shape in enumerate(_SHAPES)]
    if "special" in case.with_:
        values = special_values(dtype)
        grads[2][: 700 * len(values)] = values.repeat(700)
    grads[4] = grads[4].contiguous(memory_format=torch.channels_last)
    grads[1] = grads[1].t().contiguous().t()
    buffers = [numbers(40 + k, shape, wide, 4.0) for k, shape in enumerate(_SHAPES)]
    parameters = [numbers(60 + k, shape, wide) for k, shape in enumerate(_SHAPES)]
    data = {"grads": grads, "buffers": buffers, "parameters": parameters}
    if wide is torch.float32 and ("pairs" in case.with_ or "chance" in case.with_):
        data["buffers"] = [b.to(torch.bfloat16) for b in buffers]
        if "pairs" in case.with_:
            high = data["buffers"]
            data["low"] = [(b - h.float()).to(h) for b, h in zip(buffers, high, strict=True)]
    return data


def compute(case: Case, data: dict[str, list[Tensor]], pieces: list[slice]) -> Outputs:
    """All outputs; ``pieces`` are of the list. A flush takes the list whole: its norm is of all."""
    words = case.with_.split()
    buffers = [t.clone() for t in data["buffers"]]
    low = [t.clone() for t in data["low"]] if "low" in data else None
    outputs: Outputs = {}
    if "flush" in words:
        clip, fine = "clip" in words, data["grads"][0].dtype is not torch.float64
        dtype = data["grads"][0].dtype if fine else torch.float64
        grads = [torch.empty_like(t, dtype=dtype) for t in buffers]
        stats = flush_(
            grads, buffers, denominator=37.0, grad_scale=8.0,
            parameters=data["parameters"] if "penalties" in words else None,
            l1=0.25 if "penalties" in words else 0.0, l2=0.5 if "penalties" in words else 0.0,
            max_norm=3.0 if clip else None, compensation=low,
        )  # fmt: skip
        outputs = {f"gradient {k}": g for k, g in enumerate(grads)}
        outputs["norm"] = stats.norm.reshape(1)
    else:
        alpha, beta = (0.75, -1.5) if "factors" in words else (1.0, 1.0)
        for piece in pieces:
            some = (buffers[piece], data["grads"][piece])
            if low is not None:
                more: dict[str, Any] = {"compensation": low[piece]}
            else:
                seeds = [1 << k for k in range(piece.start, piece.stop)]
                more = {"seeds": seeds} if "chance" in words else {}
            if "measure" in words:
                measured = accumulate_(*some, alpha, beta, measure=True, **more)
                squares = torch.as_tensor(measured.squared_norms).reshape(-1)
                outputs[f"squares {piece.start}"] = squares
            else:
                accumulate_(*some, alpha, beta, **more)
        parts = [outputs.pop(name) for name in list(outputs)]
        if parts:
            outputs["squared norms"] = torch.cat(parts)
        outputs |= {f"buffer {k}": b for k, b in enumerate(buffers)}
        outputs |= {f"low part {k}": c for k, c in enumerate(low or [])}
    return outputs


def cuts(case: Case) -> dict[str, list[slice]]:
    """The list whole, tensor by tensor, and in two."""
    n = len(_SHAPES)
    if "flush" in case.with_:
        return {"whole": [slice(0, n)]}
    return {
        "whole": [slice(0, n)],
        "one by one": [slice(k, k + 1) for k in range(n)],
        "two": [slice(0, 3), slice(3, n)],
    }


__all__ = ["FORMATS", "LISTS", "compute", "cuts", "make"]
