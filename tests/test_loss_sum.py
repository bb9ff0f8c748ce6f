"""LossSum is the correctly rounded sum for every order, cut, and number of processes."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mbkern
from mbkern import _C


def exact(values: Tensor) -> Fraction:
    return sum((Fraction(v) for v in values.double().flatten().tolist()), Fraction(0))


def rounded(value: Fraction, mantissa: int, smallest: int, largest: int) -> float:
    """To nearest even in a binary format: bits of its significand, exponents of its ends."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - mantissa + 1)
    result = round(magnitude / unit) * unit  # Fraction rounds ties to even
    if result >= Fraction(2) ** (largest + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(result), value)


FORMATS = {
    torch.float64: (53, -1022, 1023),
    torch.float32: (24, -126, 127),
    torch.float16: (11, -14, 15),
    torch.bfloat16: (8, -126, 127),
}


def assert_exact(total: mbkern.LossSum, values: Tensor) -> None:
    value = exact(values)
    for dtype, parameters in FORMATS.items():
        got = total.value(dtype=dtype)
        assert got.dtype is dtype
        assert got.item() == rounded(value, *parameters), dtype


def test_the_reference_itself() -> None:
    """Against the conversions of the machine."""
    for bits in range(0, 1 << 31, 99_999_989):
        x = np.array([bits], dtype=np.uint32).view(np.float32)[0]
        if np.isfinite(x):
            assert rounded(Fraction(float(x)), *FORMATS[torch.float32]) == x
    for x in np.random.default_rng(0).standard_normal(300) * 10.0 ** np.arange(-50, 50, 1 / 3):
        with np.errstate(over="ignore"):
            assert rounded(Fraction(x), *FORMATS[torch.float32]) == np.float32(x)
            assert rounded(Fraction(x), *FORMATS[torch.float16]) == np.float16(x)


def wide(n: int, seed: int) -> Tensor:
    """fp32 numbers of every exponent and sign."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 0x7F800000, (n,), generator=g, dtype=torch.int32)
    signs = torch.randint(0, 2, (n,), generator=g, dtype=torch.int32) * -0x80000000
    return (bits | signs.to(torch.int32)).view(torch.float32)


#: Exponents of terms: at both ends of the bins, and in the middle.
SIZES = [(-150, -60), (-62, -50), (-50, -40), (-40, -34), (-30, 0), (0, 16), (16, 24), (-150, 120)]
SETS = {
    "losses": torch.rand(100_003, generator=torch.Generator().manual_seed(1)) * 12,
    "every exponent": wide(20_011, 2),
    "large mixes": torch.tensor([1e38, -1e38, 1.0, 3e38, -3e38, 1e-45, -1.0, 1e-38] * 999 + [5.0]),
    "overflow": torch.full((4099,), 3e38),
    "denormals": torch.full((65_537,), 1e-45),
    "ties": torch.tensor([2.0**24, 1.0, 2.0**-30, -(2.0**-30)] * 3),
    "above a tie": torch.tensor([2.0**24, 1.0, 1e-45]),
    "below a tie": torch.tensor([2.0**24, 1.0, -1e-45]),
    "tie of float64": torch.tensor([2.0**53, 1.0, 1e-45]),
    "cancelled": torch.tensor([1e38, 1e-45, -1e38]),
    "zeros": torch.tensor([-0.0] * 5),
    "nothing": torch.tensor([]),
}


@pytest.mark.parametrize("name", SETS)
def test_exact(name: str) -> None:
    values = SETS[name]
    assert_exact(mbkern.LossSum().add(values), values)
    finite = exact(values)
    assert abs(finite) < 2**1000
    fsum = math.fsum(values.double().tolist())
    assert mbkern.LossSum().add(values).value(dtype=torch.float64).item() == fsum


@pytest.mark.parametrize("name", SETS)
def test_cuts_and_orders(name: str) -> None:
    values = SETS[name]
    want = mbkern.LossSum().add(values).state
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))]
    for pieces in (1, 2, 7):
        total = mbkern.LossSum()
        for piece in shuffled.chunk(pieces):
            total.merge(mbkern.LossSum().add(piece))
        assert torch.equal(total.state, want)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40))
def test_any_list(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    total = mbkern.LossSum()
    for number in values:
        total.add(number)
    assert_exact(total, values)
    assert torch.equal(total.state, mbkern.LossSum().add(values.flip(0)).state)


@pytest.mark.parametrize(
    ("numbers", "want"),
    [
        ([1.0, math.inf], math.inf),
        ([1.0, -math.inf], -math.inf),
        ([3e38, 3e38, -math.inf], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([math.nan, math.inf], math.nan),
    ],
)
def test_infinities_and_nan(numbers: list[float], want: float) -> None:
    total = mbkern.LossSum()
    for number in numbers:
        total.merge(mbkern.LossSum().add(torch.tensor([number])))
    for dtype in FORMATS:
        value = total.value(dtype=dtype).item()
        assert value == want or (math.isnan(value) and math.isnan(want))


def test_merge_itself_and_denominator() -> None:
    total = mbkern.LossSum().add(torch.tensor([1.0, 2.0]))
    assert total.merge(total) is total
    assert total.value().item() == 6.0
    for three in (3, 3.0, torch.tensor(3.0), torch.tensor(3)):
        assert total.value(three).item() == 2.0
    want = struct.unpack("f", struct.pack("f", 6.0 / 7.0))[0]
    assert total.value(7).item() == want
    assert total.reset().value().item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "columns"), [("cross_entropy", 9), ("cross_entropy", 999), ("mse_loss", 70)]
)
def test_a_mini_batch_for_every_cut(name: str, columns: int, dtype: torch.dtype) -> None:
    """The loss of the whole: the correctly rounded sum of the fp32 terms, for every cut."""
    g = torch.Generator().manual_seed(columns)
    x = (5 * torch.randn(50, columns, generator=g)).to(dtype)
    target = torch.randint(columns, (50,), generator=g)
    if name == "mse_loss":
        target = torch.randn(50, columns, generator=g).to(dtype)
    terms, _ = mbkern.loss_and_grad(name, x, target, reduction="none", loss_dtype=torch.float32)
    want = mbkern.LossSum().add(terms)
    assert_exact(want, terms)
    for reduction in ("none", "mean", "sum"):
        for size in (50, 10, 1, 7):
            total = mbkern.LossSum()
            for part in zip(x.split(size), target.split(size), strict=True):
                mbkern.loss_and_grad(name, *part, reduction=reduction, loss_sum=total)
            assert torch.equal(total.state, want.state), f"{reduction}, pieces of {size}"
    whole, _ = mbkern.loss_and_grad(name, x, target, reduction="sum", loss_dtype=torch.float32)
    assert whole.item() == want.value().item()


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("name", ["mse_loss", "half_squared_error"])
def test_elements_of_every_size(name: str, isa: str) -> None:
    """Element-wise losses are summed in bins of fp64, where they fit: no term may lose a bit."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        for n, (low, high) in itertools.product((1, 17, 5003), SIZES):
            g = torch.Generator().manual_seed(n)
            powers = torch.empty(n).uniform_(low / 2, high / 2, generator=g)
            x = torch.exp2(powers) * (1 + torch.rand(n, generator=g))
            zero, total = torch.zeros(n), mbkern.LossSum()
            terms, _ = mbkern.loss_and_grad(name, x, zero, reduction="none", loss_sum=total)
            assert torch.equal(total.state, mbkern.LossSum().add(terms).state), (n, low, high)
    finally:
        _C.set_isa(before)


#: Powers of two of successive stretches of losses: bins move to what is small, or large.
STRETCHES = {
    "small": (-70,),
    "tiny": (-140, -149),
    "large": (60,),
    "huge": (100, 120),
    "smaller and smaller": (0, -20, -40, -60, -80, -100, -120, -140),
    "larger and larger": (-60, -30, 0, 30, 60, 90, 110),
    "just beyond the bins": (-60, -37, -14, 9, 32),
    "to and fro": (-60, 0, -60, 40, -60, 110),
}


@pytest.mark.parametrize("layout", ["plain", "strided", "losses kept", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STRETCHES)
def test_stretches_of_one_size(name: str, dtype: torch.dtype, layout: str, isa: str) -> None:
    """Losses that are all small or large, from stretch to stretch, and a few others among them."""
    length, step, total = 6 * 1024, 2 if layout == "strided" else 1, mbkern.LossSum()
    g = torch.Generator().manual_seed(1)
    parts = [
        torch.ldexp(torch.rand(length, generator=g) + 1, torch.tensor(power))
        for power in STRETCHES[name]
    ]
    x = torch.cat(parts).to(dtype)
    x[5::701], x[7::1501], x[9::2003] = 1.0, 0.0, 2.0**-100
    x = x[: len(x) - (3 if layout == "ragged" else 0)]
    wide = torch.zeros(step * len(x), dtype=dtype)
    wide[::step] = x
    reduction = "none" if layout == "losses kept" else "sum"
    options = {"reduction": reduction, "loss_sum": total}
    mbkern.loss_and_grad("l1_loss", wide[::step], torch.zeros_like(x), **options)
    assert torch.equal(total.state, mbkern.LossSum().add(x.float()).state)
    if math.isfinite(total.value(dtype=torch.float32).item()):
        assert_exact(total, x)


def test_small_losses_that_fill_the_bins(isa: str) -> None:
    """Rests of nearly half a unit of the coarse bin, all of one sign, above one of the last bit."""
    total, top = mbkern.LossSum(), 2.0**-60
    x = torch.full((80_000,), top * 2.0**-27 * (1 - 2.0**-24))
    x[::512], x[1::512] = top, top * 2.0**-46 * (1 + 2.0**-23)
    mbkern.loss_and_grad("l1_loss", x, torch.zeros_like(x), reduction="sum", loss_sum=total)
    assert torch.equal(total.state, mbkern.LossSum().add(x).state)


def test_no_numbers_among_small_losses() -> None:
    x = torch.full((20_000,), 2.0**-70)
    for index, value in ((3, math.inf), (9_000, -math.inf), (19_999, math.nan)):
        x[index], total = value, mbkern.LossSum()
        mbkern.loss_and_grad("l1_loss", x, torch.zeros_like(x), reduction="sum", loss_sum=total)
        want = mbkern.LossSum().add(x.abs())
        assert torch.equal(total.state, want.state), value


def test_only_another_one_is_merged() -> None:
    with pytest.raises(TypeError, match=r"^mbkern: merge takes a LossSum, not Tensor"):
        mbkern.LossSum().merge(torch.zeros(12))  # type: ignore[arg-type]


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        mbkern.LossSum().add(torch.zeros(3, dtype=torch.float64))
    for name, target in (
        ("mse_loss", torch.zeros(3, 4).double()),
        ("cross_entropy", torch.zeros(3).long()),
    ):
        with pytest.raises(TypeError, match="float64"):
            mbkern.loss_and_grad(
                name, torch.zeros(3, 4).double(), target, loss_sum=mbkern.LossSum()
            )


def test_state_dict_pickle_and_copy() -> None:
    total = mbkern.LossSum().add(SETS["every exponent"])
    loaded = mbkern.LossSum()
    loaded.load_state_dict(total.state_dict())
    for other in (loaded, pickle.loads(pickle.dumps(total)), copy.deepcopy(total)):
        assert torch.equal(other.state, total.state)
        other.add(torch.tensor([1.0]))
        assert not torch.equal(other.state, total.state), "the state is shared"
    assert total.state.nbytes == 96
    with pytest.raises(ValueError, match="12"):
        loaded.load_state_dict({"state": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"no 'state' but \['sum'\]"):
        loaded.load_state_dict({"sum": total.state})
    assert not loaded.state.equal(mbkern.LossSum().state), "what it had is lost"


@pytest.mark.parametrize("state", [torch.zeros(12, dtype=torch.int64, device="meta"),
                                   torch.ones(12, dtype=torch.int64).to_sparse()])  # fmt: skip
def test_a_state_without_numbers_is_refused(state: Tensor) -> None:
    total = mbkern.LossSum().add(torch.ones(3))
    with pytest.raises(TypeError, match=r"^mbkern: the state of a LossSum is"):
        total.load_state_dict({"state": state})
    assert total.value() == 3


def test_a_sum_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        total = mbkern.LossSum().add(torch.ones(3))
    total.add(torch.ones(1)).load_state_dict(total.state_dict())
    assert total.value() == 4
    assert total.reset().value() == 0


def test_negated_views() -> None:
    """What lies in memory has the other sign; contiguous ones were added as that."""
    for values in (torch._neg_view(torch.ones(3)), torch.imag(torch.tensor([3j]).conj())):
        assert values.is_neg()
        assert values.is_contiguous()
        assert mbkern.LossSum().add(values).value() == -3


class Model:
    """A LossSum beside its exact value: a fraction, and whether there was NaN, inf or -inf."""

    def __init__(self) -> None:
        self.sum, self.exact, self.special = mbkern.LossSum(), Fraction(0), {*()}

    def add(self, values: Tensor) -> None:
        self.sum.add(values)
        for value in values.double().flatten().tolist():
            if math.isfinite(value):
                self.exact += Fraction(value)
            else:
                self.special.add(str(value))

    def take(self, other: Model, how: int) -> None:
        exact, special = other.exact, {*other.special}
        if how == 0:
            self.sum.merge(other.sum)
        else:  # as after an all-reduce by hand: without carries
            self.sum.load_state_dict({"state": self.sum.state + other.sum.state})
        self.exact, self.special = self.exact + exact, self.special | special

    def value(self, denominator: float | None, dtype: torch.dtype) -> float:
        """By the definition: rounded to fp64, divided, rounded."""
        if self.special:
            sign = float(next(iter(self.special))) if len(self.special) == 1 else math.nan
            return sign if denominator is None else sign / denominator
        if denominator is None:
            return rounded(self.exact, *FORMATS[dtype])
        with np.errstate(all="ignore"):
            quotient = np.float64(rounded(self.exact, *FORMATS[torch.float64])) / denominator
        return (
            rounded(Fraction(float(quotient)), *FORMATS[dtype])
            if np.isfinite(quotient) else float(quotient)
        )  # fmt: skip


def some_values(rng: random.Random) -> Tensor:
    """Of every exponent, at the ends, and in every layout."""
    n = rng.choice([0, 1, 2, 3, 16, 40])
    ends = [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF]
    bits = [rng.choice([*ends, rng.randrange(0x7F800000)]) for _ in range(n)]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    values *= torch.tensor([rng.choice([1.0, -1.0]) for _ in range(n)])
    values = values.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    if rng.random() > 0.1:
        values = values.nan_to_num(0.0, 0.0, 0.0)  # fp16 has overflowed
    elif n:
        values[rng.randrange(n)] = rng.choice([math.nan, math.inf, -math.inf])
    layouts = [
        values, values.repeat_interleave(2)[::2], values.flip(0), values.view(-1, 1).expand(-1, 3),
        values.view(2, -1).t() if n % 2 == 0 else values, torch._neg_view(values),
        values.detach().requires_grad_(),
    ]  # fmt: skip
    return rng.choice(layouts)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_against_fractions(seed: int) -> None:
    rng = random.Random(seed)
    models = [Model() for _ in range(3)]
    for _ in range(rng.randint(2, 15)):
        model, other = rng.choice(models), rng.choice(models)
        step = rng.randrange(8)
        if step < 4:
            model.add(some_values(rng))
        elif step < 6:
            model.take(other, step - 4)
        elif step == 6:
            model.sum = pickle.loads(pickle.dumps(copy.deepcopy(model.sum)))
        elif rng.random() < 0.3:
            model.sum.reset()
            model.exact, model.special = Fraction(0), {*()}
        for dtype in FORMATS:
            denominator = rng.choice([None, 3.0, 0.1, -2.5, 1e300, 1e-300])
            got = model.sum.value(denominator, dtype=dtype).item()
            want = model.value(denominator, dtype)
            assert got == want or (math.isnan(got) and math.isnan(want)), (dtype, denominator)


RANK = """
import sys, torch, mbkern
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.FileStore(file, 2), rank=rank, world_size=2
)
values = torch.linspace(-3e38, 3e38, 10_001) + rank * 1e-3
values[rank::7] = 1e-45
total = mbkern.LossSum().add(values)
total.all_reduce()
print(total.state.tolist())
torch.distributed.destroy_process_group()
"""


def test_all_reduce(tmp_path: Path) -> None:
    """Two processes over gloo."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    want = mbkern.LossSum()
    for rank in range(2):
        values = torch.linspace(-3e38, 3e38, 10_001) + rank * 1e-3
        values[rank::7] = 1e-45
        want.add(values)
    assert outputs == [f"{want.state.tolist()}\n"] * 2
