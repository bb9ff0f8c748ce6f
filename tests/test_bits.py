"""The same bits for every cut of the batch, thread count, instruction set and layout.

With ``reduction="sum"``, or a mean with one ``denominator``. None of more than 10^8 elements of
gradients may differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, Case, Sample
from same_bits import same_bits
from torch import Tensor

import mbkern
from mbkern import _C

pytestmark = pytest.mark.usefixtures("restored")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
compared = 0  # gradient elements, in this session


def cuts(n: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Sizes of the pieces: whole, single rows, about five pieces of ten, ragged."""
    yield [n]
    yield [1] * n
    yield [10] * (n // 10) + [n % 10] * (n % 10 > 0)
    for _ in range(2):
        ends = torch.randint(1, n + 1, (6,), generator=generator).unique().tolist()
        yield [b - a for a, b in itertools.pairwise([0, *ends[: -1 if ends[-1] == n else None], n])]


def pieces(
    name: str, x: Tensor, target: Tensor, sizes: list[int], options: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unreduced losses, gradient of the mean with one denominator, and the exact sum."""
    sample_weight = options.get("sample_weight")
    total = mbkern.LossSum() if x.dtype is not torch.float64 else None
    losses, grads, begin = [], [], 0
    per_item = {k: v for k, v in options.items() if k in ("var", "target", "pos_weight")}
    for size in sizes:
        part = slice(begin, begin + size)
        begin += size
        options = {**options, **{k: v[part] for k, v in per_item.items()}}
        if sample_weight is not None:
            options = {**options, "sample_weight": sample_weight[part]}
        loss, _ = mbkern.loss_and_grad(name, x[part], target[part], reduction="none", **options)
        _, grad = mbkern.loss_and_grad(
            name, x[part], target[part], denominator=57.0, loss_sum=total, **options
        )
        losses.append(loss)
        grads.append(grad)
    assert begin == len(x)
    return torch.cat(losses), torch.cat(grads), total.state if total is not None else None


def check(name: str, x: Tensor, target: Tensor, seed: int, **options: object) -> None:
    global compared
    generator = torch.Generator().manual_seed(seed)
    first = None
    for isa, threads in itertools.product(_C.isas(), (1, 2, 3)):
        _C.set_isa(isa)
        torch.set_num_threads(threads)
        every = list(cuts(len(x), generator))
        # The scalar tier is slow where it emulates fma: one cut for each number of threads.
        for sizes in every[threads : threads + 1] if isa == "scalar" else every:
            results = pieces(name, x, target, sizes, options)
            first = first or results
            for got, want, what in zip(results, first, ("loss", "gradient", "sum"), strict=True):
                same = want is None or same_bits(got, want)
                assert same, f"{what}: {isa}, {threads} threads, cut {sizes}"
            compared += x.numel()


SHAPES = [(64, 3), (50, 10), (57, 33), (64, 64), (61, 65), (37, 513), (50, 1024), (33, 4099)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuts_threads_and_isas(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    x[::5] *= 4  # rows with few terms that matter
    target = torch.randint(shape[1], shape[:1], generator=generator)
    target[3::11] = -100
    check("cross_entropy", x, target, shape[0])


OPTIONS = {
    "weights": {"weight": True, "sample_weight": True},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "softcap": {"softcap": 20.0, "label_smoothing": 0.1},
    "probabilities": {"label_smoothing": 0.1, "weight": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [21, 1500])
@pytest.mark.parametrize("kind", OPTIONS)
def test_options(kind: str, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    compute = torch.promote_types(dtype, torch.float32)
    x = (3 * torch.randn(43, columns, generator=generator)).to(dtype)
    target = torch.randint(columns, (43,), generator=generator)
    if kind == "probabilities":
        target = torch.rand(43, columns, generator=generator).to(dtype)
    options = dict(OPTIONS[kind])
    for name, size in (("weight", columns), ("sample_weight", 43)):
        if name in options:
            options[name] = torch.rand(size, generator=generator).to(compute)
    check("cross_entropy", x, target, columns, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mse_loss", "half_squared_error"])
def test_elementwise(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(50, 1201, generator=generator).to(dtype) for _ in range(2))
    check(name, x, y, 1)


NEW = [case for case in CASES if not case.has_rows and "squared_error" not in case.name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NEW, ids=lambda case: case.name)
def test_every_elementwise_loss(case: Case, dtype: torch.dtype) -> None:
    """The cuts of small tensors; fp32 and fp64 are all that their mathematics is compiled for."""
    shape = (13, 301) if dtype.itemsize > 2 else (5, 70)
    for variation in case.variations:
        if variation.name == "sample weight":  # of items, not of rows of items
            continue
        sample = case.sample(shape, dtype, variation)
        check_sample(case, sample)


def check_sample(case: Case, sample: Sample) -> None:
    """Losses and all gradients, whole and in two, by every instruction set and two threads."""
    options = {"argnums": case.differentiable, "denominator": 57.0}
    first: list[Tensor] | None = None
    for isa, threads, begin in itertools.product(_C.isas(), (1, 2), (0, 1, 4)):
        _C.set_isa(isa)
        torch.set_num_threads(threads)
        total = mbkern.LossSum() if sample.input.dtype is not torch.float64 else None
        parts = []
        for piece in (slice(0, begin), slice(begin, None)):
            tensors = [t[piece] for t in case.tensors(sample).values()]
            names = [n for n in sample.options if n not in case.arguments]
            rest = {n: v for n in names if not isinstance(v := sample.options[n], Tensor)}
            if "weight" in names and case.name not in ("mse_loss", "l1_loss"):
                rest["weight"] = sample.options["weight"][piece]
            loss, _ = mbkern.loss_and_grad(case.name, *tensors, reduction="none", **rest)
            _, grads = mbkern.loss_and_grad(case.name, *tensors, **options, **rest, loss_sum=total)
            parts.append([loss, *grads])
        results = [torch.cat(pair) for pair in zip(*parts, strict=True)]
        if total is not None:
            results.append(total.state)
        first = first or results
        for k, (got, want) in enumerate(zip(results, first, strict=True)):
            assert same_bits(got, want), f"{isa}, {threads} threads, cut at {begin}: result {k}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_million_elements(dtype: torch.dtype) -> None:
    """Rows drawn anew, until enough has been compared (all dtypes together: > 10^8)."""
    generator = torch.Generator().manual_seed(0)
    begin = compared
    for seed in itertools.count():
        columns = int(torch.randint(130, 30000, (), generator=generator))
        x = torch.randn(17, columns, generator=generator).mul_(1 + seed % 7).to(dtype)
        target = torch.randint(columns, (17,), generator=generator)
        check("cross_entropy", x, target, seed)
        if compared - begin > 26_000_000:
            break


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("columns", [3, 65])
def test_many_items_at_once(columns: int, isa: str) -> None:
    """Threads that add losses to sums all the time: none may get in another's way."""
    _C.set_isa(isa)
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(30_000, columns, generator=generator)
    target = torch.randint(columns, (30_000,), generator=generator)
    weight = torch.rand(30_000, generator=generator)
    states = []
    for threads in (1, 2, 2, 2, 3, 4):
        torch.set_num_threads(threads)
        total = mbkern.LossSum()
        options = {"sample_weight": weight, "loss_sum": total, "loss_dtype": torch.float64}
        loss, _ = mbkern.loss_and_grad("cross_entropy", x, target, **options)
        mbkern.loss_and_grad("mse_loss", x, x.flip(0), loss_sum=total)
        states.append((loss.item(), total.state.tolist()))
    assert states == [states[0]] * len(states)


@pytest.mark.parametrize("columns", [7, 64, 65, 300, 512, 513, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", *OPTIONS])
def test_layouts(kind: str, dtype: torch.dtype, columns: int) -> None:
    """Lanes along the row or across items, contiguous or strided: the same bits."""
    generator = torch.Generator().manual_seed(columns)
    compute = torch.promote_types(dtype, torch.float32)
    options = dict(OPTIONS.get(kind, {}))
    rows = (4 * torch.randn(24, columns, generator=generator)).to(dtype)  # (2 * 3 * 4, C)
    rows[5] = float("nan")
    rows[7, 1] = float("inf")
    target = torch.randint(columns, (24,), generator=generator)
    target[3] = -100
    if kind == "probabilities":
        target = torch.rand(24, columns, generator=generator).to(dtype)
    if "weight" in options:
        options["weight"] = torch.rand(columns, generator=generator).to(compute)
    per_item = torch.rand(24, generator=generator).to(compute)
    if "sample_weight" in options:
        options["sample_weight"] = per_item

    def as_images(t: Tensor) -> Tensor:
        return t.view(2, 3, 4, *t.shape[1:]).permute(0, 3, 1, 2) if t.dim() > 1 else t.view(2, 3, 4)

    want = mbkern.loss_and_grad("cross_entropy", rows, target, reduction="none", **options)
    for isa in _C.isas():
        _C.set_isa(isa)
        images = as_images(rows)  # channels_last in memory
        image_options = dict(options)
        if "sample_weight" in options:
            image_options["sample_weight"] = as_images(per_item)
        last, transposed = rows.t().contiguous().t(), as_images(rows).contiguous()
        for x, t, o in (
            (rows, target, options),
            (last, target, options),
            (images, as_images(target), image_options),
            (transposed, as_images(target).contiguous(), image_options),
            (transposed.flatten(2), as_images(target).flatten(-2), flat(image_options)),
        ):
            got = mbkern.loss_and_grad("cross_entropy", x, t, reduction="none", **o)
            grad = got[1].movedim(1, -1).reshape(24, columns)
            assert same_bits(got[0].reshape(24), want[0]), f"loss: {isa}, {x.stride()}"
            assert same_bits(grad, want[1]), f"gradient: {isa}, {x.stride()}"


def flat(options: dict[str, object]) -> dict[str, object]:
    weight = options.get("sample_weight")
    return options if weight is None else {**options, "sample_weight": weight.flatten(1)}


@pytest.mark.parametrize("columns", [1, 9, 64, 100, 101, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_buffer_of_an_ignored_row_is_not_touched(columns: int, dtype: torch.dtype) -> None:
    """Not even a NaN in it that is not the one that kernels write; in any layout and tier."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(40, columns).to(dtype)
    target = torch.zeros(40, dtype=torch.int64)
    target[3] = -100
    inf = torch.tensor(float("inf"), dtype=wide)
    row = (inf - inf).expand(columns)  # with a sign, where the processor makes it
    for isa in _C.isas():
        _C.set_isa(isa)
        for name in ("cross_entropy", "softmax_focal_loss", "nll_loss"):
            for buffer in (torch.zeros(40, columns, dtype=wide),
                           torch.zeros(columns, 40, dtype=wide).t()):  # fmt: skip
                buffer[3] = row
                before = buffer[3].clone()
                mbkern.loss_and_grad(name, x, target, grad_out=buffer, accumulate=True)
                assert same_bits(buffer[3], before), (isa, name, buffer.stride())
