"""The product whose sums have a fixed order: right, and the same bits for every cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from guarded import Arena, in_child
from torch import Tensor

import mbkern.functional as M
from mbkern import _C
from mbkern import _launch_product as products

pytestmark = pytest.mark.cpu
SHAPES = [(7, 5, 3), (600, 50, 70), (300, 13, 33), (1, 1, 1), (0, 4, 5), (513, 24, 64), (3, 0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def operands(
    depth: int, rows: int, columns: int, a: torch.dtype, b: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if torch.float64 in (a, b) else torch.float32
    return (
        torch.randn(depth, rows, generator=g).to(a),
        torch.randn(columns, depth, generator=g).to(b).t(),
        torch.randn(rows, columns, generator=g).to(wide),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(isa: str, shape: tuple[int, int, int]) -> None:
    pairs = [(a, b) for a, b in itertools.product(DTYPES, DTYPES) if torch.float64 not in (a, b)]
    for a_type, b_type in [*pairs, (torch.float64, torch.float64)]:
        a, b, c = operands(*shape, a_type, b_type)
        orders = [products.CHAIN, products.BLOCKS]
        if a_type is b_type is torch.bfloat16 and products.has_pairs():
            orders.append(products.PAIRS)
        limit = 1e-13 if c.dtype is torch.float64 else 1e-5
        size = (a.double().abs().t() @ b.double().abs() + 4).amax() if c.numel() else 1.0
        for order in orders:
            exact = a.double().t() @ b.double()
            for fresh, want in ((False, c.double() + exact), (True, exact)):
                got = products.product(c.clone(), a, b, order, fresh=fresh)
                error = (got.double() - want).abs().max() / size if got.numel() else 0.0
                assert error <= limit, (a_type, b_type, order, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_chain_can_be_cut_anywhere(dtype: torch.dtype) -> None:
    """One chain an element: any cut of the depth, any thread count, every instruction set."""
    a, b, c = operands(700, 37, 71, dtype, dtype)
    want = None
    before, threads = _C.isa(), torch.get_num_threads()
    try:
        for isa, cuts, n in itertools.product(
            _C.isas(), ([], [350], [1, 2, 300, 699], [256, 512]), (1, 2, 5)
        ):
            _C.set_isa(isa)
            torch.set_num_threads(n)
            got = c.clone()
            for first, end in itertools.pairwise([0, *cuts, 700]):
                products.product(got, a[first:end], b[first:end])
            want = got if want is None else want
            assert torch.equal(got.view(torch.int32), want.view(torch.int32)), (isa, cuts, n)
    finally:
        _C.set_isa(before)
        torch.set_num_threads(threads)


def test_blocks_do_not_depend_on_rows_threads_or_isa() -> None:
    a, b, c = operands(900, 37, 71, torch.float32, torch.float32)
    whole = products.product(c.clone(), a, b, products.BLOCKS)
    before = _C.isa()
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            part = products.product(c[5:9].clone(), a[:, 5:9], b, products.BLOCKS)
            assert torch.equal(part, whole[5:9]), isa
            # Shards of whole blocks, one behind the other.
            shards = c.clone()
            for first in (0, 256, 768):
                end = {0: 256, 256: 768, 768: 900}[first]
                products.product(shards, a[first:end], b[first:end], products.BLOCKS)
            assert torch.equal(shards, whole), isa
    finally:
        _C.set_isa(before)


def test_the_chain_is_one_of_fused_operations() -> None:
    """By hand, in exact arithmetic: fma(a, b, c) rounds once."""
    a, b = torch.tensor([[1 + 2.0**-12], [2.0**-30]]), torch.tensor([[1 + 2.0**-12], [1.0]])
    c = products.product(torch.tensor([[-1.0]]), a, b)
    exact = (1 + 2.0**-12) ** 2 - 1  # 2^-11 + 2^-24: fits a float, a rounded product would not
    assert c.item() == torch.tensor(exact + 2.0**-30, dtype=torch.float64).float().item()


# Of (depth, width) matrices: neighbours along the width, along the depth, nowhere.
LAYOUTS = {
    "width": lambda depth, width: (width, 1),
    "depth": lambda depth, width: (1, depth),
    "rows of others": lambda depth, width: (1, depth + 3),
    "neither": lambda depth, width: (3 * width, 3),
}


def integers(arena: Arena, layout: str, depth: int, width: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose products add up exactly in every order; guarded."""
    stride = LAYOUTS[layout](depth, width)
    like = torch.empty_strided((depth, width), stride, dtype=dtype, device="meta")
    values = (torch.arange(depth).unsqueeze(1) * 7 + torch.arange(width) * 3) % 17 - 8
    return arena.output(like).copy_(values)


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_are_packed_from_any_layout(
    isa: str, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    """Every rest of the depth, and rows and columns around whole tiles; nothing beside an operand
    is read."""
    orders = [products.CHAIN]
    if dtype is torch.bfloat16 and products.has_pairs():
        orders.append(products.PAIRS)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def all_sizes() -> None:
        torch.set_num_threads(1)  # torch's own products hang in a child
        arena = Arena(2, 8 * 3 * 70 * 50)
        depths = [*range(1, 20), 31, 32, 33, 47, 48, 50]
        widths = [(12, 32), (11, 31), (13, 33), (16, 48), (6, 16), (7, 15), (23, 17), (28, 70)]
        for (k, depth), back in itertools.product(enumerate(depths), (True, False)):
            rows, columns = widths[k % len(widths)]
            arena.start(0, back)
            a = integers(arena, layouts[0], depth, rows, dtype)
            b = integers(arena, layouts[1], depth, columns, dtype)
            want = (a.double().t() @ b.double()).to(wide)
            for order in orders:
                c = torch.full((rows, columns), torch.nan, dtype=wide)
                products.product(c, a, b, order, fresh=True)
                assert torch.equal(c, want), (depth, rows, columns, order, back)

    in_child(all_sizes)


def test_products_in_bfloat16_stay_torchs_where_they_are_allowed(isa: str) -> None:
    """Ours take the place of torch's only where those of full precision are asked for."""
    before = torch.get_float32_matmul_precision()
    ours = _C.is_amd() and isa == "avx512" and torch.backends.mkl.is_available()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            assert products.beat_torch(torch.float32) == ours
        torch.set_float32_matmul_precision("medium")
        assert not products.beat_torch(torch.float32)
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.mkldnn, "matmul"):  # not in older versions
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            x, w = torch.randn(32, 8, requires_grad=True), torch.randn(5, 8)
            M.linear_cross_entropy(x, w, torch.arange(32) % 5).backward()
            assert not products.beat_torch(torch.float32)
            torch.backends.mkldnn.matmul.fp32_precision = "ieee"
            assert products.beat_torch(torch.float32) == ours
    finally:
        torch.set_float32_matmul_precision(before)
    assert not products.beat_torch(torch.float64)


def test_threads_share_the_work() -> None:
    """However few rows or columns: as many parts as threads, and the same bits."""
    threads = torch.get_num_threads()
    try:
        for shape in [(300, 13, 700), (300, 700, 13), (300, 100, 100), (300, 1, 1), (40, 512, 512)]:
            a, b, c = operands(*shape, torch.float32, torch.float32)
            want = None
            for n in (1, 2, 3, 7, 16, 61):
                torch.set_num_threads(n)
                got = products.product(c.clone(), a, b)
                want = got if want is None else want
                assert torch.equal(got, want), (shape, n)
    finally:
        torch.set_num_threads(threads)


def test_special_values_and_strides(isa: str) -> None:
    a = torch.tensor([[1.0, float("inf"), float("nan"), 1e-42]])
    c = products.product(torch.zeros(4, 1), a, torch.ones(1, 1))
    assert c[0, 0] == 1
    assert c[1, 0] == float("inf")
    assert c[2].view(torch.int32).item() == 0x7FC00000
    assert c[3, 0] == torch.tensor(1e-42)  # not flushed
    torch.set_flush_denormal(True)
    try:
        again = products.product(torch.zeros(4, 1), a, torch.ones(1, 1))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(again.view(torch.int32), c.view(torch.int32))
    base = torch.randn(9, 40)
    strided = products.product(torch.zeros(5, 7), base[:, 3:13:2], base[:, 30:37])
    assert torch.equal(
        strided,
        products.product(torch.zeros(5, 7), base[:, 3:13:2].clone(), base[:, 30:37].clone()),
    )
    wide = torch.zeros(5, 20)
    products.product(wide[:, 2:9], base[:, 3:13:2], base[:, 30:37])
    assert torch.equal(wide[:, 2:9], strided)
    assert wide[:, :2].abs().sum() + wide[:, 9:].abs().sum() == 0


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(4, 5)),
        (torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(5, 4)),
        (torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.float64), torch.zeros(4, 5).double()),
        (torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(4, 5).bfloat16()),
        (torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(5, 4).t()),
        (torch.zeros(3, 4).int(), torch.zeros(3, 5), torch.zeros(4, 5)),
        (torch.zeros(3, 4, device="meta"), torch.zeros(3, 5), torch.zeros(4, 5)),
    ],
)
def test_refusals(a: Tensor, b: Tensor, c: Tensor) -> None:
    before = c.clone()
    with pytest.raises(NotImplementedError, match="no product of"):
        products.product(c, a, b)
    assert torch.equal(c, before)


def test_pairs_go_with_bfloat16_only() -> None:
    a, b, c = operands(8, 4, 4, torch.float32, torch.float32)
    with pytest.raises(NotImplementedError, match="no product of"):
        products.product(c, a, b, products.PAIRS)
