"""The arithmetic of accumulation and flush as docs/numerics.md has it, written in NumPy."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BITS = {4: torch.int32, 2: torch.int16, 8: torch.int64}
SHAPES = (
    (), (0,), (1,), (3,), (5, 7), (2, 0, 3), (31,), (33,), (513,), (4097,), (8, 3, 5, 2),
    (2,) * 8, (130, 70), (64, 65), (3, 1, 4100),
)  # fmt: skip
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 1.2e-38, 3.4e38, -3.4e38, 65504.0, 6e-8)


# ---- the arithmetic -----------------------------------------------------------------------------


def fma(a: Any, b: Array, c: Array) -> Array:
    """fp32: a product that is exact in fp64, a sum rounded to odd there, and then once.
    fp64: two roundings."""
    if b.dtype == np.float64:
        return a * b + c
    product, wide = np.float64(a) * b.astype(np.float64), c.astype(np.float64)
    s = product + wide
    back = s - product
    error = (product - (s - back)) + (wide - back)
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & (error != 0) & (bits & 1 == 0)
    bits += np.where(inexact, np.where((error > 0) == (s > 0), 1, -1), 0)
    return s.astype(np.float32)


def to_bf16(x: Array) -> Array:
    return torch.from_numpy(x).to(BF16).float().numpy()


def added(b: Array, g: Array, alpha: float, beta: float) -> Array:
    """fma(alpha, g, beta b) in the type of b; without b where beta is 0."""
    kind = b.dtype.type
    if kind(beta) == 0:
        return kind(alpha) * g.astype(b.dtype)
    return fma(kind(alpha), g.astype(b.dtype), kind(beta) * b)


def paired(b: Array, low: Array, g: Array, alpha: float, beta: float) -> tuple[Array, Array]:
    t = added(b + low, g, alpha, beta)
    high = to_bf16(t)
    return high, np.where(np.isfinite(high), to_bf16(t - high), np.float32(0))


def block_sums(terms: Array) -> Array:
    """Of blocks of 4096: 8 segments of 512, 32 lanes, which add in order and are joined by halves;
    so are the segments."""
    blocks = np.zeros((-(-len(terms) // 4096), 8, 16, 32))
    blocks.reshape(-1)[: len(terms)] = terms
    lanes = np.zeros((*blocks.shape[:2], 32))
    for k in range(16):
        lanes = lanes + blocks[:, :, k]
    return halved(halved(lanes))


def halved(x: Array) -> Array:
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def ordered(terms: Array) -> float:
    """The sum of up to 4096 blocks, which are summed as elements are."""
    sums = block_sums(terms)
    return float(block_sums(sums)[0]) if len(sums) else 0.0


def in_memory_order(like: Tensor, x: Array) -> Array:
    dims = sorted(range(like.dim()), key=lambda d: -like.stride(d) * (like.shape[d] > 1))
    return x.reshape(like.shape).transpose(dims).reshape(-1).astype(np.float64)


def flushed(
    like: list[Tensor],
    sums: list[Array],
    scale: float,
    penalties: list[tuple[Tensor | None, float, float]],
    max_norm: float | None,
) -> tuple[list[Array], float, float, float, list[float]]:
    """The gradients before their last rounding; norm, clip factor, penalty, squares."""
    out, squares, values = [], [], []
    for t, b, (p, l1, l2) in zip(like, sums, penalties, strict=True):
        kind, v = b.dtype.type, b.dtype.type(scale) * b
        value = 0.0
        if l1 or l2:
            assert p is not None
            of = numbers(p).astype(b.dtype)
            term = kind(l2) * of
            if l1:
                term = fma(kind(l2), of, kind(l1) * np.where(of == 0, of, np.sign(of)))
            v = fma(kind(scale), b, term)
            wide = in_memory_order(t, of)
            each = l1 * np.abs(wide) + l2 / 2 * (wide * wide) if l1 else wide * wide
            value = ordered_penalty(each, 1.0 if l1 else l2 / 2)
        out.append(v)
        values.append(value)
        squares.append(ordered(in_memory_order(t, v) ** 2))
    norm = math.sqrt(ordered(np.array(squares)))
    clip = 1.0
    if max_norm is not None and out:
        clip = math.nan if math.isnan(norm) else min(1.0, max_norm / (norm + 1e-6))
    grads = [v.dtype.type(clip) * v for v in out]
    return grads, norm, clip, ordered(np.array(values)), squares


def ordered_penalty(terms: Array, factor: float) -> float:
    sums = factor * block_sums(terms)
    return float(block_sums(sums)[0]) if len(sums) else 0.0


# ---- tensors ------------------------------------------------------------------------------------


def numbers(t: Tensor) -> Array:
    """Its elements in fp32, or fp64 if it is that; flat."""
    wide = t.detach().to(F64 if t.dtype == F64 else F32)
    return wide.contiguous().reshape(-1).numpy().copy()


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(BITS[t.element_size()])


def same_bits(got: Tensor, want: Array) -> bool:
    rounded = torch.from_numpy(want).to(got.dtype)
    nan = {F32: 0x7FC00000, BF16: 0x7FC0, F16: 0x7E00, F64: 0x7FF8000000000000}[got.dtype]
    return torch.equal(bits(got), bits(rounded).masked_fill(rounded.isnan(), nan))


def close(a: Any, b: float) -> bool:
    return float(a) == b or (math.isnan(float(a)) and math.isnan(b))


class Chance:
    """Tensors of random values, types and layouts."""

    def __init__(self, seed: int) -> None:
        self.rng, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=self.torch, dtype=F64)
        kind = self.rng.choice(["plain", "plain", "wild", "special"])
        if kind == "wild":
            x = x * torch.exp2(torch.randint(-150, 128, shape, generator=self.torch).double())
        elif kind == "special":
            some = torch.randint(len(SPECIAL), shape, generator=self.torch)
            chosen = torch.tensor(SPECIAL, dtype=F64)[some]
            x = torch.where(torch.rand(shape, generator=self.torch) < 0.3, chosen, x)
        return x.to(dtype)

    def laid(self, x: Tensor, *, read: bool = False) -> Tensor:
        """The same with other strides: permuted, with gaps, not aligned, expanded."""
        how = self.rng.choice(["dense", "permuted", "gaps", "offset", "expanded"])
        if how == "expanded" and read and x.dim() and x.shape[0]:
            return x[:1].expand(x.shape)
        if how == "offset":
            return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
        order = list(range(x.dim()))
        self.rng.shuffle(order)
        back = [order.index(d) for d in range(x.dim())]
        if how == "permuted":
            return x.permute(order).contiguous().permute(back)
        if how == "gaps" and x.dim():
            step = self.rng.choice([2, 3])
            room = x.new_zeros([n * step for n in x.permute(order).shape])
            part = room[tuple(slice(None, None, step) for _ in order)]
            return part.copy_(x.permute(order)).permute(back)
        return x.clone()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, *, read: bool = False) -> Tensor:
        return self.laid(self.values(shape, dtype), read=read)

    def number(self, value: float) -> Any:
        """In one of the ways in which it may be given."""
        kinds: list[Any] = [float, np.float64, np.array, lambda v: torch.tensor(v, dtype=F64)]
        return self.rng.choice(kinds)(value)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A buffer of bf16 and what it cannot hold."""
        b = self.tensor(shape, BF16)
        low = torch.randn(shape, generator=self.torch) * b.float().abs() * 2.0**-9
        return b, self.laid(low.nan_to_num(0, 0, 0).to(BF16))
