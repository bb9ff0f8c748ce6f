"""Sums in bfloat16 buffers: pairs and rounding by chance, against the same arithmetic in NumPy."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from same_bits import check_same_bits
from test_accumulate import LAYOUTS, SIZES, layouts
from torch import Tensor

import mbkern
from mbkern import GradAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test says otherwise
BF16 = torch.bfloat16
GRADS = (torch.float32, torch.bfloat16, torch.float16)


def make(of: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Buffers, what they cannot hold, and gradients."""
    random = torch.Generator().manual_seed(seed)
    sums = [torch.randn(n, generator=random) * 30 for n in SIZES]
    buffers = [s.to(BF16) for s in sums]
    low = [(s - b.float()).to(BF16) for s, b in zip(sums, buffers, strict=True)]
    return buffers, low, [torch.randn(n, generator=random).to(of) for n in SIZES]


def mixed(x: Any) -> Any:
    """The hash of the header, in NumPy."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
    return x ^ (x >> np.uint32(15))


def chance(seed: int, n: int) -> Any:
    """16 random bits for each of n elements."""
    with np.errstate(over="ignore"):
        low = mixed(np.uint32(seed & 0xFFFFFFFF) + np.uint32(0x9E3779B9))
        high = mixed(np.uint32(seed >> 32) ^ low)
        return mixed(mixed(np.arange(n, dtype=np.uint32) ^ low) + high) >> np.uint32(16)


def rounded_by_chance(x: Tensor, seed: int) -> Tensor:
    bits = x.contiguous().reshape(-1).numpy().view(np.uint32) + chance(seed, x.numel())
    return torch.from_numpy((bits & np.uint32(0xFFFF0000)).view(np.float32)).to(BF16)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("of", GRADS)
def test_pairs(isa: str, of: torch.dtype, beta: float) -> None:
    buffers, low, grads = make(of)
    sums = [
        g.float() + ((b.float() + c.float()) * beta if beta else 0)
        for b, c, g in zip(buffers, low, grads, strict=True)
    ]
    mbkern.accumulate_(buffers, grads, beta=beta, compensation=low)
    for b, c, s in zip(buffers, low, sums, strict=True):
        assert torch.equal(b, s.to(BF16))
        assert torch.equal(c, (s - s.to(BF16).float()).to(BF16))
        # 16 bits: what is lost is half a unit of the low part.
        assert ((b.double() + c.double() - s.double()).abs() <= 2.0**-17 * s.double().abs()).all()


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("of", GRADS)
def test_chance(isa: str, of: torch.dtype, beta: float) -> None:
    buffers, _, grads = make(of)
    seeds = [(1 << 53) - 1 - 987654321987 * k for k in range(len(buffers))]
    expected = [
        rounded_by_chance(g.float() + b.float() * beta, seed)
        for b, g, seed in zip(buffers, grads, seeds, strict=True)
    ]
    mbkern.accumulate_(buffers, grads, beta=beta, seeds=seeds)
    assert all(torch.equal(b, e) for b, e in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(isa: str, kind: str) -> None:
    """Elements are counted in the order of the buffer's memory, however that lies."""
    for of in GRADS:
        buffer, grad = layouts(kind, BF16, of)
        low, sums = torch.zeros_like(buffer), buffer.float() + grad.float()
        pair, again = buffer.clone(), buffer.clone()
        mbkern.accumulate_(pair, grad, compensation=low)
        assert torch.equal(pair, sums.to(BF16))
        assert torch.equal(low, (sums - sums.to(BF16).float()).to(BF16))
        mbkern.accumulate_(again, grad, seeds=77)
        order = sorted(range(4), key=lambda d: -buffer.stride(d))
        flat = rounded_by_chance(sums.permute(order), 77)
        assert torch.equal(again.permute(order).reshape(-1), flat.reshape(-1))


def test_special_values(isa: str) -> None:
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(torch.float32).max
    b = torch.tensor([inf, -inf, nan, 1, inf, 0.0, -0.0, 1], dtype=BF16)
    g = torch.tensor([1, 1, 1, nan, -inf, 0.0, -0.0, largest])
    for arguments in ({"compensation": torch.zeros(8, dtype=BF16)}, {"seeds": 5}):
        to = b.clone()
        mbkern.accumulate_(to, g, **arguments)
        assert torch.equal(to[:2], b[:2])
        assert (to[2:5].view(torch.int16) == 0x7FC0).all()
        if "seeds" in arguments:
            assert torch.equal(torch.signbit(to[5:7]), torch.tensor([False, True]))
        for low in arguments.values():
            assert isinstance(low, int) or (low[:5] == 0).all()


def test_chance_is_right_on_average() -> None:
    """Over seeds, over elements, and for neighbours and successors together."""
    x = torch.full((4096,), 1 + 2.0**-9 + 2.0**-11)  # 0.3125 of the way to the next
    ups = []
    for seed in range(1000):
        b = torch.empty(4096, dtype=BF16)
        mbkern.accumulate_(b, x, beta=0, seeds=seed)
        assert ((b == 1) | (b == 1 + 2.0**-7)).all()
        ups.append(b > 1)
    up = torch.stack(ups).double()
    p = float((x[0].double() - 1) * 128)
    spread = (p * (1 - p)) ** 0.5
    assert abs(up.mean() - p) < 5 * spread / up.numel() ** 0.5
    assert ((up.mean(0) - p).abs() < 6 * spread / 1000**0.5).all()
    assert ((up.mean(1) - p).abs() < 6 * spread / 4096**0.5).all()
    away = (up - p) / spread
    for other in (away.roll(1, 0), away.roll(1, 1), away.roll(16, 1), away.roll((1, 1), (0, 1))):
        assert abs((away * other).mean()) < 5 / up.numel() ** 0.5


def test_512_micro_batches() -> None:
    """Of one sign, the worst case for 8 bits: torch's bfloat16 buffer stops at 256 times the step.

    A pair loses at most 2^-17 of the sum at each step; chance has a variance of at most a quarter
    of a squared unit at each.
    """
    random = torch.Generator().manual_seed(3)
    grads = (torch.rand(512, 20_000, generator=random) / 2 + 0.5).to(BF16)
    exact = grads.double().sum(0)
    plain, pair, single = (torch.zeros(20_000, dtype=BF16) for _ in range(3))
    low = torch.zeros(20_000, dtype=BF16)
    for k, g in enumerate(grads):
        plain += g
        mbkern.accumulate_(pair, g, compensation=low)
        mbkern.accumulate_(single, g, seeds=k)
    of_pair = (pair.double() + low.double() - exact) / exact
    of_single = (single.double() - exact) / exact
    assert ((plain.double() - exact) / exact).abs().mean() > 0.3
    assert of_pair.abs().max() < 512 * 2.0**-18
    assert of_pair.square().mean().sqrt() < 3e-5
    assert abs(of_single.mean()) < 1e-3
    assert of_single.square().mean().sqrt() < 0.04


def digest() -> str:
    torch.manual_seed(0)
    sha = hashlib.sha1()
    for of in GRADS:
        buffers, low, grads = make(of)
        for kind in LAYOUTS:
            b, g = layouts(kind, BF16, of)
            buffers.append(b)
            low.append(torch.zeros_like(b))
            grads.append(g)
        grads[8][3] = float("nan")
        chances = [b.clone() for b in buffers]
        for alpha, beta in ((1.0, 1.0), (0.1, 0.9), (-3.0, 0.0)):
            measured = mbkern.accumulate_(
                buffers, grads, alpha, beta, measure=True, compensation=low
            )
            again = mbkern.accumulate_(chances, grads, alpha, beta, measure=True, seeds=11)
            assert torch.equal(
                measured.squared_norms.nan_to_num(7), again.squared_norms.nan_to_num(7)
            )
            for to in (torch.float32, BF16):
                flushed = [torch.empty_like(b, dtype=to) for b in buffers]
                stats = mbkern.flush_(
                    flushed, buffers, denominator=37, max_norm=4.0, compensation=low
                )
                for t in (*flushed, stats.squared_norms):
                    sha.update(t.float().contiguous().numpy().tobytes())
            for t in (*buffers, *low, *chances, measured.squared_norms):
                sha.update(t.double().contiguous().numpy().tobytes())
    return sha.hexdigest()


def test_bits(isa: str) -> None:
    check_same_bits(isa, digest)


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_flush(isa: str, to: torch.dtype) -> None:
    buffers, low, _ = make(torch.float32)
    for pairs in (True, False):
        grads = [torch.empty_like(b, dtype=to) for b in buffers]
        parameters = [torch.ones_like(b) for b in buffers]
        stats = mbkern.flush_(
            grads, buffers, denominator=8, parameters=parameters, l2=0.5,
            compensation=low if pairs else None,
        )  # fmt: skip
        total = torch.zeros((), dtype=torch.float64)
        for g, b, c in zip(grads, buffers, low, strict=True):
            v = (b.float() + c.float() if pairs else b.float()) / 8 + 0.5
            assert torch.equal(g, v.to(to))
            total += v.double().square().sum()
        assert (stats.norm - total.sqrt()).abs() <= 1e-12 * total.sqrt()
    mbkern.flush_(buffers, buffers, denominator=8, compensation=low)  # in place
    again, low, _ = make(torch.float32)
    for b, a, c in zip(buffers, again, low, strict=True):
        assert torch.equal(b, ((a.float() + c.float()) / 8).to(BF16))


def bad_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    b, f = torch.zeros(9, dtype=BF16), torch.zeros(9)
    return [
        ({"buffers": b}, TypeError, r"buffers\[0\] is torch.bfloat16, whose 8 bits.*compensation="),
        ({"buffers": b.half()}, TypeError, "float16"),
        ({"buffers": b, "grads": f.double(), "seeds": 1}, TypeError, "bfloat16.*float64"),
        ({"buffers": b, "compensation": f}, ValueError, r"compensation\[0\].*float32"),
        ({"buffers": b, "compensation": b[:4]}, ValueError, r"compensation\[0\] \(4,\)"),
        ({"buffers": f, "compensation": b}, ValueError, "compensation is for bfloat16 buffers"),
        ({"buffers": b, "compensation": [b, b]}, ValueError, "one of compensation.*2 and 1"),
        ({"buffers": b, "compensation": b}, ValueError, "share memory"),
        ({"buffers": b, "compensation": b[:1].expand(9)}, ValueError, "elements of compensation"),
        ({"buffers": b, "seeds": -1}, ValueError, r"seed is -1; it must be in \[0, 2\^53\)"),
        ({"buffers": b, "seeds": 1 << 53}, ValueError, "seed is 9007199254740992"),
        ({"buffers": b, "seeds": [1, 2]}, ValueError, "one of seeds.*2 and 1"),
        ({"buffers": b, "seeds": 1.5}, TypeError, "float"),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_refusals(case: int) -> None:
    arguments, error, message = bad_calls()[case]
    written = [t for t in arguments.values() if isinstance(t, Tensor)]
    with pytest.raises(error, match=message):
        mbkern.accumulate_(**{"grads": torch.ones(9), **arguments})
    assert all((t == 0).all() for t in written), "something was written"


@pytest.mark.cpu
def test_the_rest_of_a_call() -> None:
    """Buffers of other types in the same call, NumPy's arrays, versions, autograd."""
    f, d, b = torch.zeros(5), torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=BF16)
    low = torch.zeros(5, dtype=BF16)
    mbkern.accumulate_([f, d, b], [torch.full((5,), 1.01)] * 3, compensation=[None, None, low])
    assert (f == torch.full((5,), 1.01)).all()
    assert (b.float() + low.float() - 1.01).abs().max() < 2e-5
    mbkern.accumulate_([f, d, b], [torch.ones(5)] * 3, seeds=[1, 2, 3])
    assert (f > 2).all()
    versions = b._version, low._version
    mbkern.accumulate_(b, np.ones(5, np.float32), compensation=low)
    assert b._version > versions[0]
    assert low._version > versions[1]
    low.requires_grad_()
    with pytest.raises(RuntimeError, match=r"compensation\[0\] requires grad"):
        mbkern.accumulate_(b, torch.ones(5), compensation=low)


# ---- the accumulator --------------------------------------------------------------------------


def net(dtype: torch.dtype = BF16) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3).to(memory_format=torch.channels_last),
        torch.nn.Flatten(),
        torch.nn.Linear(288, 10),
    ).to(dtype)


def window(acc: GradAccumulator, model: torch.nn.Module, parts: int = 8, seed: int = 1) -> None:
    random = torch.Generator().manual_seed(seed)
    for _ in range(parts):
        x = torch.randn(3, 1, 8, 8, generator=random).to(next(model.parameters()).dtype)
        target = torch.randint(10, (3,), generator=random)
        acc.backward(F.cross_entropy(model(x), target, reduction="sum"), count=3)


@pytest.mark.parametrize("kind", ["kahan", "stochastic"])
@pytest.mark.parametrize("mode", ["deferred", "streaming", "known"])
def test_accumulator(kind: str, mode: str) -> None:
    model, wide = net(), net()
    reference = GradAccumulator(wide)
    window(reference, wide)
    exact = reference.flush()
    results = []
    for layout in ("flat", "parameter"):
        acc = GradAccumulator(
            model, dtype=BF16, compensation=kind, seed=3, mode=mode, layout=layout
        )
        if mode == "known":
            acc.begin(total=24)
        window(acc, model)
        stats = acc.flush()
        assert abs(stats.norm / exact.norm - 1) < (1e-3 if kind == "kahan" else 2e-2)
        results.append([p.grad.clone() for p in model.parameters()])
        for p in model.parameters():
            p.grad = None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for g, p in zip(results[0], wide.parameters(), strict=True):
        error = (g.double() - p.grad.double()).abs().max() / p.grad.double().abs().max()
        assert error < (2.0**-8 if kind == "kahan" else 2.0**-5)


@pytest.mark.parametrize("kind", ["kahan", "stochastic"])
def test_resumed_window_has_the_same_bits(kind: str) -> None:
    model = net()
    whole = GradAccumulator(model, dtype=BF16, compensation=kind)
    window(whole, model, 2, seed=9)
    whole.flush()
    window(whole, model, 4, seed=5)
    state = whole.state_dict()
    window(whole, model, 3, seed=6)
    whole.flush()
    expected = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    whole.close()
    again = GradAccumulator(model, dtype=BF16, compensation=kind)
    again.load_state_dict(state)
    window(again, model, 3, seed=6)
    again.flush()
    for e, p in zip(expected, model.parameters(), strict=True):
        assert torch.equal(e, p.grad)
    with pytest.raises(ValueError, match="compensation"):
        GradAccumulator(model).load_state_dict(state)
    if kind == "stochastic":
        with pytest.raises(ValueError, match="seed 0, this accumulator of 4"):
            GradAccumulator(model, dtype=BF16, compensation=kind, seed=4).load_state_dict(state)


def test_chance_differs_from_window_to_window() -> None:
    model = net()
    acc = GradAccumulator(model, dtype=BF16, compensation="stochastic")
    found = []
    for _ in range(2):
        window(acc, model)
        acc.flush()
        found.append([p.grad.clone() for p in model.parameters()])
        for p in model.parameters():
            p.grad = None
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_memory() -> None:
    """Half of float32's by chance, and as much in pairs."""

    def bytes_of(**arguments: Any) -> int:
        acc = GradAccumulator(torch.nn.Linear(512, 512, bias=False).to(BF16), **arguments)
        return sum(
            t.nbytes for s in acc._members.slots for t in (*s.buffers, *s.low) if t is not None
        )

    wide = bytes_of()
    assert bytes_of(dtype=BF16, compensation="stochastic") == wide // 2
    assert bytes_of(dtype=BF16, compensation="kahan") == wide


def test_double_parameters_keep_double_buffers() -> None:
    parameters = [torch.nn.Parameter(torch.ones(5, dtype=d)) for d in (BF16, torch.float64)]
    for kind in ("kahan", "stochastic"):
        acc = GradAccumulator(parameters, dtype=BF16, compensation=kind, measure=True)
        acc.backward(sum((p.double() * 1.1).sum() for p in parameters), count=1)
        acc.flush()
        assert (parameters[1].grad == 1.1).all()
        for p in parameters:
            p.grad = None
        acc.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": BF16}, "compensation must be one of kahan, stochastic, not None"),
        ({"dtype": BF16, "compensation": "other"}, "not 'other'"),
        ({"compensation": "kahan"}, "is for dtype=torch.bfloat16"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"dtype": BF16, "compensation": "kahan", "denominators": ("a", "b")}, "one denominator"),
        ({"dtype": BF16, "compensation": "kahan", "into": "fp32_grad"}, "needs float32 buffers"),
    ],
)
def test_refused_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradAccumulator(net(), **arguments)


def test_no_kernel_adds_to_bf16() -> None:
    model = net()
    acc = GradAccumulator(model, dtype=BF16, compensation="kahan")
    with pytest.raises(NotImplementedError, match="buffer\\(\\) does not go with compensation="):
        acc.buffer(next(model.parameters()))


def test_seeds_of_any_kind_of_integers() -> None:
    def rounded(seeds: Any) -> list[Tensor]:
        buffers = [torch.ones(64, dtype=BF16), torch.ones(64, dtype=BF16)]
        mbkern.accumulate_(buffers, [torch.full((64,), 2.0**-8)] * 2, seeds=seeds)
        return buffers

    expected = rounded([5, 6])
    assert not torch.equal(*expected)
    for seeds in (np.array([5, 6]), torch.tensor([5, 6]), (torch.tensor(5), np.int64(6))):
        assert all(torch.equal(a, b) for a, b in zip(rounded(seeds), expected, strict=True))
    for seeds in ("56", [5.5, 6], None, ["5", "6"]):
        with pytest.raises(TypeError, match="seeds"):
            rounded(seeds)


@pytest.mark.parametrize("kind", ["kahan", "stochastic"])
def test_a_state_is_checked_before_it_is_taken_over(kind: str) -> None:
    model = net()
    acc = GradAccumulator(model, dtype=BF16, compensation=kind)
    window(acc, model, 2)
    state = acc.state_dict()
    name = next(iter(state["low"]))
    for change in (
        {"low": {**state["low"], name: [torch.zeros(1, dtype=BF16)]}},
        {"low": {n: v for n, v in state["low"].items() if n != name}},
        {"additions": {}},
        {"counts": {"zzz": (1.0, None)}},
    ):
        with pytest.raises(ValueError, match=r"mbkern: .*state"):
            acc.load_state_dict({**state, **change})
        assert acc._window.micro_batches == 2, "something was taken over"
    acc.flush()


def test_resumed_in_another_order() -> None:
    """Chance goes by names, as the state does."""
    model = net()
    named = list(model.named_parameters())
    results = []
    for order in (named, named[::-1]):
        acc = GradAccumulator(order, dtype=BF16, compensation="stochastic")
        window(acc, model)
        acc.flush()
        results.append([p.grad.clone() for p in model.parameters()])
        acc.close()
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
