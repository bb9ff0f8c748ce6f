"""GradAccumulator beside a model of it, in windows of random happenings.

A gradient is made by the loss ``(p * g).sum()``, so it is g, exactly, in every dtype here, and the
model needs neither autograd nor a kernel: it adds the same g up in fp64.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mbkern import GradAccumulator, WindowStats, _accumulator_collect
from mbkern import functional as F

WIDE = torch.float64
SHAPES = ((5,), (3, 4), (1,), (), (0,), (2, 3, 2), (4200,))
# What one addition into a buffer may lose of the largest partial sum: a unit in the last place of
# the dtype; of a pair of bfloat16 2^-17; rounded by chance, a whole unit of bfloat16.
UNIT = {"fp32": 2.0**-24, "fp64": 2.0**-53, "kahan": 2.0**-16, "stochastic": 2.0**-7}
LAST = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, WIDE: 2.0**-53}


@dataclass
class Sums:
    """What the model knows of a parameter.

    Attributes:
        sums: of its gradients, one for each set of buffers; None where there was none.
        sizes: of the gradients' magnitudes, for the bound.
        added: how many gradients.
    """

    parameter: Tensor
    l1: float
    l2: float
    sums: list[Tensor | None]
    sizes: list[Tensor]
    added: int = 0

    def add(self, which: int, grad: Tensor, alpha: float) -> None:
        value = grad.detach().to(WIDE) * alpha
        before = self.sums[which]
        self.sums[which] = value if before is None else before + value
        self.sizes[which] = self.sizes[which] + value.abs()
        self.added += 1


@dataclass
class Noise:
    """The estimate of McCandlish et al., as mbkern.NoiseScale's docstring has it."""

    square: float = 0.0
    variance: float = 0.0
    weight: float = 0.0
    size: float = 0.0  # of what was subtracted, for the bound

    def update(self, norms: list[float], counts: list[float], big: float, total: float) -> None:
        pairs = [(a, n) for a, n in zip(norms, counts, strict=True) if n > 0]
        if len(pairs) < 2 or not all(map(math.isfinite, [*norms, big])):
            return
        mean_square = sum(a / n**2 for a, n in pairs) / len(pairs)
        inverse = sum(1 / n for _, n in pairs) / len(pairs) - 1 / total
        variance = (mean_square - big) / inverse
        self.square = 0.99 * self.square + 0.01 * (big - variance / total)
        self.variance = 0.99 * self.variance + 0.01 * variance
        self.weight = 0.99 * self.weight + 0.01
        self.size = 0.99 * self.size + 0.01 * (mean_square + big) * (1 + 1 / inverse)


@dataclass
class Model:
    """A window in fp64, and what outlives it."""

    of: dict[str, Sums]
    names: tuple[str, ...]
    known: bool
    counts: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    micro_batches: int = 0
    norms: list[float] = field(default_factory=list)  # squared, of each micro-batch
    sizes: list[float] = field(default_factory=list)  # what each counted
    measured: bool = True
    noise: Noise = field(default_factory=Noise)
    clipped: list[bool] = field(default_factory=list)

    def which(self, name: str) -> int:
        return 0 if self.known else self.names.index(name)

    def forget(self) -> None:
        for one in self.of.values():
            one.sums = [None] * len(one.sums)
            one.sizes = [torch.zeros((), dtype=WIDE)] * len(one.sums)
            one.added = 0
        self.counts, self.totals, self.micro_batches = {}, {}, 0
        self.norms, self.sizes, self.measured = [], [], True

    def received(self) -> list[str]:
        return [n for n, one in self.of.items() if any(s is not None for s in one.sums)]

    def gradient(self, name: str, scale: float, unit: float) -> tuple[Tensor, Tensor]:
        """The gradient before clipping, and what it may be off."""
        one = self.of[name]
        p = one.parameter.detach().to(WIDE)
        value = one.l2 * p + one.l1 * p.sign()
        size = value.abs()
        for k, sums in enumerate(one.sums):
            if sums is not None:
                total = 1.0 if self.known else self.counts.get(self.names[k], 0.0)
                factor = 0.0 if total == 0 else 1 / (total * scale)
                value, size = value + factor * sums, size + factor * one.sizes[k]
        # Each addition loses a unit of a partial sum, which is at most the sum of magnitudes; six
        # more for factors that are rounded, penalties and the sets' sums.
        return value, (one.added + 6) * unit * size

    def penalty(self) -> float:
        return sum(
            float(one.l1 * p.abs().sum() + one.l2 / 2 * p.square().sum())
            for one in (self.of[name] for name in self.received())
            for p in [one.parameter.detach().to(WIDE)]
        )


class Options:
    """The arguments of an accumulator, by chance; such as go together."""

    def __init__(self, rng: random.Random) -> None:
        kind = rng.choice(["fp32", "fp32", "fp32", "fp64", "kahan", "stochastic"])
        self.kind = kind
        mode = rng.choice(["deferred", "streaming", "known"])
        few = kind in ("kahan", "stochastic")
        names = ("ce", "aux") if rng.random() < 0.3 and (mode == "known" or not few) else ()
        self.names = names or ("",)
        noise = rng.random() < 0.3 and mode != "known" and not names
        penalised = not noise and rng.random() < 0.5
        self.l1, self.l2 = (
            (rng.choice([0.0, 0.01]), rng.choice([0.0, 0.1])) if penalised else (0, 0)
        )
        self.group_l2 = rng.choice([0.0, 0.3]) if penalised else 0.0
        self.into = rng.choice(["grad", "grad", "main_grad", "fp32_grad"])
        if self.into == "fp32_grad" and (few or not hasattr(Tensor, "grad_dtype")):
            self.into = "grad"
        # Buffers of float64 give 16-bit parameters no gradient: a test of its own below.
        self.half = kind != "fp64" or self.into != "grad"
        self.as_module = rng.random() < 0.4
        self.given: dict[str, Any] = {
            "dtype": {"fp32": torch.float32, "fp64": WIDE}.get(kind, torch.bfloat16),
            "compensation": kind if few else None,
            "mode": mode, "denominators": names, "into": self.into, "seed": rng.randrange(99),
            "l1": self.l1, "l2": self.l2, "max_norm": rng.choice([None, None, 0.05, 1.0, 1e3]),
            "pre_scale": rng.choice([1.0, 1.0, 2.0**-6]), "measure": rng.random() < 0.4,
            "noise_scale": noise,
        }  # fmt: skip
        self.kernels = not few and self.given["pre_scale"] == 1

    def __str__(self) -> str:
        return f"{self.given} module={self.as_module}"


class World:
    """An accumulator, its parameters and the model of both; every choice is the generator's."""

    def __init__(
        self, seed: int, layout: str = "flat", mode: str | None = None, bucket: int = 16 << 20
    ) -> None:
        self.bucket = bucket
        self.rng = random.Random(seed)
        self.values = torch.Generator().manual_seed(seed)
        self.options = Options(self.rng)
        self.mode = mode or self.options.given["mode"]
        self.given = {**self.options.given, "layout": layout, "mode": self.mode}
        self.module = nn.Module()
        self.made = 0
        for _ in range(self.rng.randint(2, 5)):
            self.new_parameter()
        self.head = f"p{self.made}"
        self.module.register_parameter(self.head, nn.Parameter(self.normal((7, 3))))
        self.made += 1
        self.first = self.made
        self.removed = False
        self.acc = self.accumulator()
        self.model = Model({}, self.options.names, self.mode == "known")
        self.know_all()
        self.scaler: torch.amp.GradScaler | None = None
        self.scale = 1.0  # in this window
        self.found: list[Tensor] = []  # all results, to compare worlds by their bits

    # ---- parameters ------------------------------------------------------------------------

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.values).to(dtype)

    def new_parameter(self) -> str:
        shape = self.rng.choice(SHAPES)
        half = torch.bfloat16 if self.options.half else torch.float32
        dtype = self.rng.choice([torch.float32, torch.float32, half, WIDE])
        value = self.normal(shape, dtype)
        if self.rng.random() < 0.3 and value.dim() > 1:
            value = value.transpose(0, -1).contiguous().transpose(0, -1)
        name = f"p{self.made}"
        self.made += 1
        self.module.register_parameter(name, nn.Parameter(value, self.rng.random() < 0.8))
        return name

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def accumulator(self) -> GradAccumulator:
        if self.options.as_module:
            return GradAccumulator(self.module, **self.given)
        pairs = list(self.parameters().items())
        # The first is given twice, as a shared parameter is: it counts once.
        groups = [{"params": [*pairs[:2], pairs[0]], "l2": self.options.group_l2},
                  {"params": pairs[2:]}]  # fmt: skip
        return GradAccumulator(groups, **self.given)

    def know_all(self) -> None:
        sets = 1 if self.mode == "known" else len(self.options.names)
        for k, (name, p) in enumerate(self.parameters().items()):
            l2 = self.options.l2
            if not self.options.as_module and k < 2:
                l2 = self.options.group_l2
            known = self.model.of.get(name)
            if known is None:
                none = [torch.zeros((), dtype=WIDE)] * sets
                self.model.of[name] = Sums(p, self.options.l1, l2, [None] * sets, none)
            elif known.parameter is not p:  # replaced, or copied
                known.parameter = p

    # ---- what happens ------------------------------------------------------------------------

    def begin(self) -> None:
        """In known mode, what the window will be divided by, whatever will be counted."""
        if self.mode == "known" and not self.model.totals:
            totals = {name: self.rng.choice([3.0, 7.0, 0.3]) for name in self.options.names}
            self.model.totals = totals
            given = {n: torch.tensor(t, dtype=WIDE) if self.rng.random() < 0.5 else t
                     for n, t in totals.items()}  # fmt: skip
            self.acc.begin(given if self.options.names != ("",) else given[""])
            for total in given.values():
                if isinstance(total, Tensor):
                    total.fill_(99.0)  # it was read

    def count(self) -> tuple[Any, float]:
        n = self.rng.choice([0, 1, 2, 5, 13])
        kind = self.rng.randrange(5)
        if self.mode == "known":  # nobody looks at a tensor, so it need not agree with the total
            return (None, 0) if kind < 3 else (torch.tensor(n), n)
        if kind == 0:
            return n, n
        if kind == 1:
            return n / 4, n / 4
        if kind == 2:
            return torch.tensor(n), n
        if kind == 3:
            return torch.tensor(n / 4, dtype=torch.float16), n / 4
        return torch.tensor(float(n), requires_grad=True), n

    def gradients(self) -> dict[str, Tensor]:
        """Of some of the parameters that require grad."""
        trained = [(n, p) for n, p in self.parameters().items() if p.requires_grad]
        some = [pair for pair in trained if self.rng.random() < 0.8] or trained[:1]
        return {n: self.normal(tuple(p.shape), p.dtype) * 2.0 ** self.rng.randint(-3, 3)
                for n, p in some}  # fmt: skip

    def loss(self, grads: dict[str, Tensor]) -> Tensor:
        own = self.parameters()
        parts = [(own[name] * g).sum().to(WIDE) for name, g in grads.items()]
        loss = torch.stack(parts).sum()
        return loss if self.scaler is None else self.scaler.scale(loss)

    def taken(
        self, grads: list[dict[str, Tensor]], denominator: str, n: float, kernel: dict[str, Tensor]
    ) -> None:
        """Tell the model of a micro-batch; with several backwards it has no norm of its own."""
        model = self.model
        alpha = 1 / model.totals[denominator] if model.known else 1.0
        for one in grads:
            for name, g in one.items():
                model.of[name].add(model.which(denominator), g.to(WIDE) * self.scale, alpha)
        for name, g in kernel.items():
            model.of[name].add(model.which(denominator), g, alpha)
        names = [name for one in [*grads, kernel] for name in one]
        model.measured &= len(names) == len(set(names)) and not (model.known and kernel)
        model.norms.append(
            sum(float(g.to(WIDE).square().sum()) for one in [*grads, kernel] for g in one.values())
        )
        model.sizes.append(n)
        model.counts[denominator] = model.counts.get(denominator, 0.0) + n
        model.micro_batches += 1

    def micro_batch(self) -> None:
        self.open_window()
        grads = self.gradients()
        if not grads:
            return
        self.clear()
        denominator = self.rng.choice(self.options.names)
        count, n = self.count()
        several = [grads]
        kernel: dict[str, Tensor] = {}
        plain = self.options.given["pre_scale"] == 1
        if plain and self.rng.random() < 0.5:
            if self.rng.random() < 0.2:
                several.append(self.gradients())
            if self.options.kernels and self.scaler is None and self.rng.random() < 0.4:
                name = self.rng.choice(list(grads))
                kernel[name] = several[0].pop(name)
                if self.rng.random() < 0.8:  # else autograd may bring one of it, too
                    several = [{k: g for k, g in one.items() if k != name} for one in several]
            several = [one for one in several if one]
            with buckets_of(self.bucket), self.acc.micro_batch(count, denominator):
                for name, g in kernel.items():
                    self.by_kernel(name, g, denominator)
                for one in several:
                    self.loss(one).backward()
        else:
            with buckets_of(self.bucket):
                self.acc.backward(self.loss(grads), count, denominator)
        self.taken(several, denominator, n, kernel)
        if self.mode == "streaming":
            self.compare(keep=True)

    def by_kernel(self, name: str, g: Tensor, denominator: str) -> None:
        alpha = 1 / self.model.totals[denominator] if self.mode == "known" else 1.0
        self.acc.buffer(self.parameters()[name], denominator).add_(g.to(WIDE) * alpha)

    def head_batch(self) -> None:
        """The fused head adds to the buffer itself."""
        w = self.parameters().get(self.head)
        if w is None or not w.requires_grad or not self.options.kernels or self.scaler:
            return
        if self.mode == "known":  # nobody divides the loss: see GradAccumulator.buffer
            return
        self.clear()
        denominator = self.rng.choice(self.options.names)
        x, target = self.normal((6, 3)), torch.arange(6)
        with self.acc.micro_batch(6, denominator):
            F.linear_cross_entropy(
                x, w, target, reduction="sum",
                accumulate_into=self.acc.buffer(w, denominator),
            ).backward()  # fmt: skip
        wide = w.detach().to(WIDE).requires_grad_()
        loss = nn.functional.cross_entropy(x.to(WIDE) @ wide.t(), target, reduction="sum")
        (g,) = torch.autograd.grad(loss, wide)
        one = self.model.of[self.head]
        self.taken([], denominator, 6, {self.head: g})
        # The head's own error, of fp32 products: some units of the largest element.
        k = self.model.which(denominator)
        one.sizes[k] = one.sizes[k] + 20 * g.abs().max() * (2**-24 / UNIT[self.options.kind])
        if self.mode == "streaming":
            self.compare(keep=True)

    def stray(self) -> None:
        """A kernel adds between two micro-batches: nothing is counted, nor measured."""
        if not self.options.kernels or self.scaler is not None:
            return
        self.begin()
        denominator = self.rng.choice(self.options.names)
        name = self.rng.choice(list(self.parameters()))
        p, model = self.parameters()[name], self.model
        if not p.requires_grad:
            return
        self.clear()
        g = self.normal(tuple(p.shape), p.dtype)
        self.by_kernel(name, g, denominator)
        alpha = 1 / model.totals[denominator] if model.known else 1.0
        model.of[name].add(model.which(denominator), g, alpha)
        model.measured = False

    def fail(self, grads: dict[str, Tensor]) -> None:
        """A micro-batch of 3 items that fails after its backward."""
        with suppress(KeyError), self.acc.micro_batch(torch.tensor(3), self.options.names[0]):
            self.loss(grads).backward()
            raise KeyError

    def fail_early(self) -> None:
        """Nothing was added: the window is as it was."""
        if self.options.given["pre_scale"] != 1:
            return
        self.open_window()
        grads = self.gradients()
        if not grads:
            return
        self.clear()
        self.fail(grads)
        if self.mode != "streaming":  # there they should be those of before: a test of its own
            assert all(p.grad is None for p in self.parameters().values())

    def fail_late(self) -> None:
        """Something was added: the window is refused until somebody decides."""
        if self.options.given["pre_scale"] != 1:
            return
        self.open_window()
        # One without elements would wait in the bucket, and be dropped.
        grads = {name: g for name, g in self.gradients().items() if g.numel()}
        if not grads:
            return
        self.clear()
        with buckets_of(1):
            self.fail(grads)
        for refused in (self.acc.flush, self.acc.state_dict):
            with pytest.raises(RuntimeError, match=r"failed .*reset\(\) drops the window"):
                refused()
        if self.rng.random() < 0.5:
            self.acc.reset()
            self.model.forget()
            self.scaler, self.scale = None, 1.0
            return
        self.acc.keep_partial()
        self.taken([grads], self.options.names[0], 3, {})
        self.model.measured = False

    def open_window(self) -> None:
        self.begin()
        if not self.model.received() and self.scaler is None and self.rng.random() < 0.25:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
            self.scale = 2.0**10

    def clear(self) -> None:
        """Others' zero_grad, of either kind, or none at all."""
        kind = self.rng.randrange(3)
        if kind and self.mode != "streaming":
            torch.optim.SGD(self.module.parameters(), lr=0.0).zero_grad(set_to_none=kind == 1)

    def drop(self) -> None:
        self.acc.reset()
        self.model.forget()
        self.scaler, self.scale = None, 1.0

    def freeze(self) -> None:
        """Or the other way: what was added stays."""
        p = self.rng.choice(list(self.parameters().values()))
        p.requires_grad_(not p.requires_grad)

    def grow(self) -> None:
        name = self.new_parameter()
        self.acc.add(self.module if self.options.as_module else [(name, self.parameters()[name])])
        self.know_all()

    def replace(self) -> None:
        if not self.options.as_module or self.model.micro_batches or self.model.received():
            return
        name = self.rng.choice(list(self.parameters()))
        old = self.parameters()[name]
        setattr(self.module, name, nn.Parameter(old.detach().clone()))
        self.acc.add(self.module)
        self.know_all()
        assert old.grad is None

    def remove(self) -> None:
        if not self.options.as_module or self.model.received() or len(self.parameters()) < 3:
            return
        name = self.rng.choice(list(self.parameters()))
        delattr(self.module, name)
        del self.model.of[name]
        self.removed = True

    def resume(self) -> None:
        """Save, and go on in a fresh accumulator of fresh parameters."""
        # A parameter that is gone is still known by name; which group one that came later belongs
        # to, a fresh accumulator cannot know.
        late = not self.options.as_module and len(self.parameters()) != self.first
        if self.removed or late:
            return
        state = self.acc.state_dict()
        self.module = copy.deepcopy(self.module)
        self.acc = self.accumulator()
        self.acc.load_state_dict(state)
        self.know_all()

    def twin(self) -> None:
        """Go on with a copy; the original does something else, of which it sees nothing."""
        old, old_module = self.acc, self.module
        self.module, self.acc = copy.deepcopy((self.module, self.acc))
        self.know_all()
        old.reset()
        for p in old_module.parameters():
            p.requires_grad_(False)
            p.grad = None

    # ---- the end of a window -------------------------------------------------------------------

    def flush(self) -> None:
        overflow = False
        if self.scaler is not None and self.model.micro_batches and self.rng.random() < 0.3:
            one = self.gradients()
            name = next((n for n, g in one.items() if g.numel()), None)
            if name is not None:
                one[name].view(-1)[0] = math.inf
                self.acc.backward(self.loss(one), torch.tensor(1), self.options.names[0])
                self.taken([one], self.options.names[0], 1, {})
                overflow = True
        self.compare(keep=False, overflow=overflow)
        self.model.forget()
        self.scaler, self.scale = None, 1.0
        if self.rng.random() < 0.2:  # and an empty one
            self.compare(keep=False)
        self.acc.max_norm = self.given["max_norm"] = self.rng.choice([self.given["max_norm"], 0.5])

    def compare(self, *, keep: bool, overflow: bool = False) -> None:
        model, stats, scale = self.model, None, 1.0
        if not keep:
            if self.scaler is None or not model.micro_batches:
                stats = self.acc.flush()
            else:
                optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0)
                before, scale = self.scaler.get_scale(), self.scale
                stats = self.acc.flush(self.scaler, optimizer)
        got = {n: p.main_grad if self.options.into == "main_grad" else p.grad
               for n, p in self.parameters().items()
               if self.options.into != "main_grad" or hasattr(p, "main_grad")}  # fmt: skip
        received = model.received()
        assert [n for n, g in got.items() if g is not None] == [n for n in received if n in got]
        if overflow:
            assert stats is not None
            assert stats.found_inf == 1
        else:
            self.compare_gradients(got, stats, scale)
        if stats is None:
            return
        self.compare_statistics(stats, overflow)
        if scale != 1.0 and self.scaler is not None:
            self.scaler.step(optimizer)
            self.scaler.update()
            assert self.scaler.get_scale() == before * (0.5 if overflow else 2.0)
        self.found += [stats.norm.clone(), stats.clip_factor.clone(), stats.penalty.clone()]
        self.found += [g.clone() for g in got.values() if g is not None]

    def compare_gradients(
        self, got: dict[str, Tensor | None], stats: WindowStats | None, scale: float
    ) -> None:
        model = self.model
        want = {}
        for name in model.received():
            wide = model.of[name].parameter.dtype == WIDE
            unit = UNIT["fp64"] if wide else UNIT[self.options.kind]
            want[name] = model.gradient(name, scale, unit)
        norm = math.sqrt(sum(float(v.square().sum()) for v, _ in want.values()))
        off = math.sqrt(sum(float(e.square().sum()) for _, e in want.values())) + 1e-12 * norm
        most = self.given["max_norm"]
        clip = 1.0 if most is None else min(1.0, most / (norm + 1e-6))
        of_clip = 0.0 if most is None else off / (norm + 1e-6) * clip
        if stats is not None:
            assert abs(float(stats.norm) - norm) <= off
            assert abs(float(stats.clip_factor) - clip) <= of_clip + 1e-12
            assert stats.found_inf == 0
            assert set(stats.squared_norms) == set(want)
            if most is not None and want:
                model.clipped.append(bool(stats.clip_factor < 1))
        for name, (value, error) in want.items():
            grad = got.get(name)
            assert grad is not None, name
            p = model.of[name].parameter
            buffer = WIDE if p.dtype == WIDE else self.given["dtype"]
            dtype = p.dtype if self.options.into == "grad" else buffer
            assert grad.dtype == dtype
            assert grad.shape == p.shape
            value = value * clip
            bound = error * clip + value.abs() * (of_clip / max(clip, 1e-30))
            bound = bound + (value.abs() + bound) * 2 * LAST[dtype] + 1e-30
            assert ((grad.to(WIDE) - value).abs() <= bound).all(), (name, grad, value)

    def compare_statistics(self, stats: WindowStats, overflow: bool) -> None:
        model = self.model
        assert stats.micro_batches == model.micro_batches
        counts = {n: float(c) for n, c in stats.counts.items()}
        assert counts == {n: model.counts.get(n, 0.0) for n in self.options.names}
        if not overflow:
            assert float(stats.penalty) == pytest.approx(model.penalty(), rel=1e-6, abs=1e-12)
        if self.given["max_norm"] is not None and model.clipped:
            share = sum(model.clipped) / len(model.clipped)
            assert float(stats.clipped_share) == pytest.approx(share)
        measures = self.options.given["measure"] or self.options.given["noise_scale"]
        if measures and model.measured:
            norms = [float(n) ** 2 for n in stats.micro_batch_norms()]
            assert norms == pytest.approx(model.norms, rel=1e-5)
        if self.acc.noise_scale is None:
            return
        if model.measured and not overflow and model.micro_batches:
            received = model.received()
            mean = [model.gradient(name, 1.0, 0.0)[0] for name in received]
            big = sum(float(m.square().sum()) for m in mean) / self.scale**2
            model.noise.update(model.norms, model.sizes, big, sum(model.counts.values()))
        if model.noise.weight:
            # The head's products are fp32, and norms of two windows cancel.
            unit = max(UNIT[self.options.kind], UNIT["fp32"])
            limit = 50 * unit * model.noise.size / model.noise.weight + 1e-12
            for value, name in ((model.noise.square, "squared_gradient"),
                                (model.noise.variance, "variance")):  # fmt: skip
                got = float(getattr(self.acc.noise_scale, name))
                assert abs(got - value / model.noise.weight) <= limit, name


@contextmanager
def buckets_of(size: int) -> Iterator[None]:
    """With 1, every gradient is added as soon as it is there."""
    before = _accumulator_collect.BUCKET_BYTES
    _accumulator_collect.BUCKET_BYTES = size
    try:
        yield
    finally:
        _accumulator_collect.BUCKET_BYTES = before


HAPPENINGS = {
    "micro_batch": 10, "flush": 4, "head_batch": 2, "stray": 0.5, "fail_early": 1, "fail_late": 1,
    "drop": 0.5, "freeze": 1, "grow": 0.5, "replace": 0.5, "remove": 0.3, "resume": 1, "twin": 1,
}  # fmt: skip


def play(seed: int, steps: int = 30, **settings: Any) -> World:
    """A random sequence of happenings, and a flush at its end."""
    world = World(seed, **settings)
    done: list[str] = []
    try:
        for _ in range(steps):
            (name,) = world.rng.choices(list(HAPPENINGS), list(HAPPENINGS.values()))
            done.append(name)
            getattr(world, name)()
        done.append("last flush")
        world.flush()
    except Exception as error:
        raise AssertionError(f"seed {seed}, {world.options}: {', '.join(done)}") from error
    return world
