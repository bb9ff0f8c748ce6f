"""GradAccumulator beside a model of it: options and parameters by chance, and the comparison.

A gradient is made by the loss ``(p * g).sum()``, so it is g, exactly, in every dtype here, and the
model needs neither autograd nor a kernel.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from accumulator_model import LAST, UNIT, WIDE, Model, Sums
from torch import Tensor, nn

from mbkern import GradAccumulator, WindowStats

SHAPES = ((5,), (3, 4), (1,), (), (0,), (2, 3, 2), (4200,))


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

    # ---- a micro-batch -----------------------------------------------------------------------

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

    # ---- the comparison ----------------------------------------------------------------------

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
