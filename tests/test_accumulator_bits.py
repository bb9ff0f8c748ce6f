"""accumulate_, flush_ and GradAccumulator beside the same arithmetic in NumPy, bit by bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from accumulator_bits import (
    BF16,
    F16,
    F32,
    F64,
    SHAPES,
    Array,
    Chance,
    added,
    close,
    flushed,
    in_memory_order,
    numbers,
    ordered,
    paired,
    same_bits,
)
from torch import Tensor, nn

import mbkern
from mbkern import GradAccumulator, WindowStats, _accumulator_collect

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def accumulates(chance: Chance) -> None:
    rng = chance.rng
    buffers, grads, low = [], [], []
    for _ in range(rng.choice([1, 2, 5])):
        shape, dtype = rng.choice(SHAPES), rng.choice([F32, F32, F64, BF16])
        b, c = chance.pair(shape) if dtype == BF16 else (chance.tensor(shape, dtype), None)
        buffers.append(b)
        low.append(c)
        of = rng.choice([F32, BF16, F16, F64] if dtype == F64 else [F32, BF16, F16])
        grads.append(chance.tensor(shape, of, read=True))
    alpha = rng.choice([1.0, 1.0, 0.5, -0.1, 1e30, 0.0, math.inf, math.nan, 1e-50])
    beta = rng.choice([1.0, 1.0, 0.0, 0.9, -1.0, 1e-50, math.nan])
    want, lows, squares = [], [], []
    for b, c, g in zip(buffers, low, grads, strict=True):
        if c is None:
            want.append(added(numbers(b), numbers(g), alpha, beta))
            lows.append(np.zeros(0))
        else:
            high, rest = paired(numbers(b), numbers(c), numbers(g), alpha, beta)
            want.append(high)
            lows.append(rest)
        squares.append(ordered(in_memory_order(b, numbers(g)) ** 2))
    given = [b.numpy() if b.dtype != BF16 and rng.random() < 0.2 else b for b in buffers]
    measured = mbkern.accumulate_(
        given, grads, chance.number(alpha), chance.number(beta), measure=True,
        compensation=None if all(c is None for c in low) else low,
    )  # fmt: skip
    for k, (b, c) in enumerate(zip(buffers, low, strict=True)):
        about = (alpha, beta, b.dtype, grads[k].dtype, b.shape, b.stride(), grads[k].stride())
        assert same_bits(b, want[k]), about
        assert c is None or same_bits(c, lows[k]), about
        assert close(measured.squared_norms[k], squares[k]), about


def flushes(chance: Chance) -> None:
    rng = chance.rng
    buffers, grads, low, penalties = [], [], [], []
    for _ in range(rng.choice([1, 2, 5])):
        shape, dtype = rng.choice(SHAPES), rng.choice([F32, F32, F64, BF16])
        b, c = chance.pair(shape) if dtype == BF16 else (chance.tensor(shape, dtype), None)
        to = rng.choice([F32, F64] if dtype == F64 else [F32, BF16, F16, F64])
        new = chance.laid(torch.zeros(shape, dtype=to))
        buffers.append(b)
        low.append(c)
        grads.append(rng.choice([new, new, b, None]))
        l1, l2 = rng.choice([(0.0, 0.0), (0.0, 0.1), (0.3, 0.0), (0.01, 1e-3)])
        p = chance.tensor(shape, rng.choice([F32, F64, BF16, F16]), read=True)
        penalties.append((p if l1 or l2 else None, l1, l2))
    factor, total, loss_scale = rng.choice([1.0, 0.1]), rng.choice([3.0, 0.0]), rng.choice([1, 8])
    max_norm = rng.choice([None, None, 0.05, 0.0, 1e30])
    sums = [
        numbers(b) if c is None else numbers(b) + numbers(c)
        for b, c in zip(buffers, low, strict=True)
    ]
    scale = factor / (total * loss_scale) if total else 0.0
    want, norm, clip, penalty, squares = flushed(buffers, sums, scale, penalties, max_norm)
    stats = mbkern.flush_(
        grads, buffers, denominator=chance.number(total), grad_scale=chance.number(loss_scale),
        factor=chance.number(factor), parameters=[p for p, _, _ in penalties],
        l1=[l1 for _, l1, _ in penalties], l2=[l2 for _, _, l2 in penalties], max_norm=max_norm,
        compensation=None if all(c is None for c in low) else low,
    )  # fmt: skip
    about = (factor, total, loss_scale, max_norm, [(b.dtype, b.shape, b.stride()) for b in buffers])
    assert close(stats.norm, norm), about
    assert close(stats.clip_factor, clip), about
    assert close(stats.penalty, penalty), about
    assert all(map(close, stats.squared_norms, squares)), about
    for grad, v in zip(grads, want, strict=True):
        assert grad is None or same_bits(grad, v), (grad.dtype, about)


@pytest.mark.parametrize("what", [accumulates, flushes])
def test_lists_of_every_kind(what: Any, isa: str) -> None:
    with np.errstate(all="ignore"):
        for seed in range(25):
            torch.set_num_threads(1 + seed % 2)
            what(Chance(seed))


# ---- windows ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sums:
    """What has been added up of a parameter: for each set of buffers, None where nothing was."""

    parameter: nn.Parameter
    l1: float
    l2: float
    paired: bool
    wide: Any
    sums: list[Any] = field(default_factory=list)
    low: Any = None

    def add(self, which: int, grad: Array, alpha: float) -> None:
        before = self.sums[which]
        there = before is not None
        b = before if there else np.zeros(len(grad), self.wide)
        if self.paired:
            low = self.low if there else b
            self.sums[which], self.low = paired(b, low, grad, alpha, float(there))
        else:
            self.sums[which] = added(b, grad, alpha, float(there))


class Windows:
    """An accumulator of random options in random windows, and what its sums are by the formula."""

    def __init__(self, seed: int, **settings: Any) -> None:
        self.chance = chance = Chance(seed)
        rng = chance.rng
        kind = rng.choice(["fp32", "fp32", "fp64", "kahan"])
        mode = rng.choice(["deferred", "streaming", "known"])
        several = rng.random() < 0.4 and (mode == "known" or kind != "kahan")
        self.names = ("a", "b", "c") if several else ("",)
        self.max_norm = rng.choice([None, None, 0.05, 10.0])
        self.pre_scale = rng.choice([1.0, 2.0**-6])
        self.into = rng.choice(["grad", "grad", "main_grad", "fp32_grad"])
        if self.into == "fp32_grad" and (kind == "kahan" or not hasattr(Tensor, "grad_dtype")):
            self.into = "grad"
        narrow = [] if kind == "fp64" and self.into == "grad" else [BF16, F16]
        groups = []
        self.of: list[Sums] = []
        for _ in range(rng.choice([1, 2])):
            l1, l2 = rng.choice([(0.0, 0.0), (0.0, 0.1), (0.01, 0.0)])
            some = []
            for _ in range(rng.choice([1, 2, 4])):
                dtype = rng.choice([F32, F32, F64, *narrow])
                p = nn.Parameter(chance.tensor(rng.choice(SHAPES), dtype))
                some.append(p)
                sets = 1 if mode == "known" else len(self.names)
                wide = np.float64 if kind == "fp64" or dtype == F64 else np.float32
                is_pair = kind == "kahan" and dtype != F64
                self.of.append(Sums(p, l1, l2, is_pair, wide, [None] * sets))
            groups.append({"params": some, "l1": l1, "l2": l2})
        self.mode = settings.pop("mode", mode)
        dtype = {"fp32": F32, "fp64": F64, "kahan": BF16}[kind]
        self.acc = GradAccumulator(
            groups, dtype=dtype, mode=self.mode, max_norm=self.max_norm, pre_scale=self.pre_scale,
            compensation="kahan" if kind == "kahan" else None, into=self.into,
            denominators=self.names if several else (), **settings,
        )  # fmt: skip
        self.found: list[Tensor] = []

    def window(self) -> None:
        rng = self.chance.rng
        self.counts = dict.fromkeys(self.names, 0.0)
        for of in self.of:
            of.sums, of.low = [None] * len(of.sums), None
        if self.mode == "known":
            self.totals = {name: rng.choice([3.0, 7.0, 0.0, 0.3]) for name in self.names}
            given = {name: self.chance.number(n) for name, n in self.totals.items()}
            self.acc.begin(given if len(given) > 1 else given[""])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**5) if rng.random() < 0.2 else None
        for _ in range(rng.choice([0, 1, 2, 5])):
            self.micro_batch(scaler)
            if self.mode == "streaming":
                self.compare(None, 1.0)
        if scaler is None or scaler._scale is None:
            self.compare(self.acc.flush(), 1.0)
        else:
            optimizer = torch.optim.SGD([of.parameter for of in self.of], lr=0.0)
            self.compare(self.acc.flush(scaler, optimizer), 2.0**5)

    def micro_batch(self, scaler: Any) -> None:
        rng = self.chance.rng
        name = rng.choice(self.names)
        known = self.mode == "known"
        n = rng.choice([0.0, 1.0, 5.0, 0.75])
        some = [of for of in self.of if rng.random() < 0.8] or self.of[:1]
        grads = [self.chance.values(tuple(of.parameter.shape), of.parameter.dtype) for of in some]
        loss = torch.stack(
            [(of.parameter * g).sum().to(F64) for of, g in zip(some, grads, strict=True)]
        ).sum()
        factor = self.pre_scale
        if scaler is not None:
            loss, factor = scaler.scale(loss), factor * 2.0**5
        self.acc.backward(loss, None if known else self.chance.number(n), name)
        self.counts[name] += 0.0 if known else n
        alpha = 1.0 / self.pre_scale
        if known:
            total = self.totals[name]
            alpha = (1.0 / total if total else 0.0) / self.pre_scale
        for of, g in zip(some, grads, strict=True):
            seen = numbers(g * torch.tensor(factor, dtype=g.dtype))
            of.add(0 if known else self.names.index(name), seen, alpha)

    def compare(self, stats: WindowStats | None, loss_scale: float) -> None:
        there = [of for of in self.of if any(s is not None for s in of.sums)]
        sums = [self.folded(of) for of in there]
        total = 1.0 if self.mode == "known" or len(self.names) > 1 else self.counts[""]
        want, norm, clip, penalty, _ = flushed(
            [of.parameter for of in there], sums, 1 / (total * loss_scale) if total else 0.0,
            [(of.parameter, of.l1, of.l2) for of in there], self.max_norm,
        )  # fmt: skip
        name = "main_grad" if self.into == "main_grad" else "grad"
        got = [getattr(of.parameter, name, None) for of in self.of]
        assert [g is not None for g in got] == [of in there for of in self.of]
        for of, v in zip(there, want, strict=True):
            grad = getattr(of.parameter, name)
            assert same_bits(grad, v), (of.parameter.dtype, of.parameter.shape, grad, v)
            self.found.append(grad.clone())
        if stats is not None:
            assert close(stats.norm, norm)
            assert close(stats.clip_factor, clip)
            assert close(stats.penalty, penalty)

    def folded(self, of: Sums) -> Array:
        if len(of.sums) == 1:
            return of.sums[0] + of.low if of.paired else of.sums[0]
        result: Any = None
        for name, part in zip(self.names, of.sums, strict=True):
            if part is not None:
                n = self.counts[name]
                factor = 1 / n if n else 0.0
                before = np.zeros_like(part) if result is None else result
                result = added(before, part, factor, float(result is not None))
        return result


def windows(seed: int, **settings: Any) -> Windows:
    found = Windows(seed, **settings)
    with np.errstate(all="ignore"):
        for _ in range(3):
            found.window()
    return found


def test_windows_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(15):
        torch.set_num_threads(2 if seed % 5 == 0 else 1)
        monkeypatch.setattr(_accumulator_collect, "BUCKET_BYTES", 1 if seed % 3 else 16 << 20)
        windows(seed, layout="flat" if seed % 2 else "parameter")
