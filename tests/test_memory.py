"""No kernel touches memory outside its tensors, and every element of an output is written."""

from __future__ import annotations

import itertools
import math
import resource
from collections.abc import Callable

import pytest
import torch
from guarded import LIBC, MAP_NORESERVE, Arena, bytes_at, in_child, map_anonymous
from same_bits import same_bits
from torch import Tensor

import mbkern
from mbkern import _C
from mbkern import functional as F

pytestmark = pytest.mark.cpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows(columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a row loss, all of them of odd sizes."""
    g = torch.Generator().manual_seed(columns)
    compute = torch.promote_types(dtype, torch.float32)
    target = torch.randint(columns, (3,), generator=g)
    target[1] = -100 if columns % 3 == 0 else target[1]
    return {
        "input": torch.randn(3, columns, generator=g).to(dtype),
        "target": target,
        "probabilities": torch.rand(3, columns, generator=g).to(dtype),
        "third": torch.randn(3, columns, generator=g).to(dtype),
        "weight": torch.rand(columns, generator=g).to(compute),
        "sample_weight": torch.rand(3, generator=g).to(compute),
        "buffer": torch.randn(3, columns, generator=g).to(compute),
        "incoming": torch.rand(3, generator=g).to(dtype),
        "denominator": torch.tensor(7.0),
        "state": torch.zeros(12, dtype=torch.int64),
    }


def fresh(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return mbkern.loss_and_grad("cross_entropy", t["input"], t["target"], reduction="none")


def in_place(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    x, weight = t["input"], t["sample_weight"]
    return mbkern.loss_and_grad("cross_entropy", x, t["target"], grad_out=x, sample_weight=weight)


def accumulate(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return mbkern.loss_and_grad(
        "cross_entropy",
        t["input"],
        t["target"],
        grad_out=t["buffer"],
        accumulate=True,
        weight=t["weight"],
        softcap=9.0,
    )


def everything(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    total = None
    if t["input"].dtype is not torch.float64:
        total = mbkern.LossSum()
        total.state = t["state"]
    return mbkern.loss_and_grad(
        "cross_entropy",
        t["input"],
        t["target"],
        weight=t["weight"],
        sample_weight=t["sample_weight"],
        denominator=t["denominator"],
        scale=t["denominator"],
        label_smoothing=0.1,
        z_loss=0.1,
        loss_sum=total,
    )


def backward(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaf = t["input"].detach().requires_grad_()
    loss = F.cross_entropy(leaf, t["target"], t["weight"], label_smoothing=0.1, reduction="none")
    loss.backward(t["incoming"])
    return loss.detach(), leaf.grad


def softcap_backward(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaf = t["input"].detach().requires_grad_()
    loss = F.cross_entropy(leaf, t["target"], reduction="none", softcap=5.0)
    loss.backward(t["incoming"])
    return loss.detach(), leaf.grad


def probabilities(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return mbkern.loss_and_grad(
        "cross_entropy", t["input"], t["probabilities"], weight=t["weight"], label_smoothing=0.1
    )


def by_columns(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Rows and columns exchanged: the columns are strided."""
    columns = len(t["weight"])
    x, p = (t[name].view(columns, 3).t() for name in ("input", "probabilities"))
    loss, grad = mbkern.loss_and_grad("cross_entropy", x, p, weight=t["weight"])
    index, index_grad = mbkern.loss_and_grad("cross_entropy", x, t["target"], grad_out=x)
    return loss, grad, index, index_grad


def pointwise(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    x, y, both = t["input"], t["probabilities"], (0, 1)
    loss, grads = mbkern.loss_and_grad("mse_loss", x, y, argnums=both, reduction="none")
    mean, more = mbkern.loss_and_grad(
        "half_squared_error", x, y, grad_out=x, sample_weight=t["sample_weight"][:, None]
    )
    return loss, *grads, mean, more


def pointwise_buffer(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    columns = len(t["weight"])
    x, y = t["input"].view(columns, 3).t(), t["probabilities"]
    return mbkern.loss_and_grad("mse_loss", x, y, grad_out=t["buffer"], accumulate=True)


def every_elementwise_loss(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One of them each time, of numbers in [0, 1], with the gradients of all of its arguments."""
    columns = len(t["weight"])
    elementwise = [loss for loss in mbkern.losses() if loss.kind == "pointwise"]
    loss = elementwise[columns // 5 % len(elementwise)]
    tensors = [t["probabilities"], t["probabilities"] * 0.5 + 0.25, t["probabilities"] + 1]
    tensors = tensors[: len(loss.arguments)]
    parts = {"argnums": loss.differentiable, "sample_weight": t["sample_weight"][:, None]}
    value, grads = mbkern.loss_and_grad(loss.name, *tensors, **parts, reduction="none")
    return value, *grads


def every_loss_of_rows(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One of them each time, with the gradients of all of its arguments."""
    columns = len(t["weight"])
    of_rows = [loss for loss in mbkern.losses() if loss.kind == "multirow"]
    loss = of_rows[columns // 5 % len(of_rows)]
    tensors = [t["input"], t["probabilities"], t["third"]][: loss.inputs]
    options = {"sample_weight": t["sample_weight"]}
    if loss.target is not None:
        classes = t["target"] if loss.ignores else t["target"].clamp(min=0)
        options["target"] = {
            "index": classes,
            "list": classes[:, None].repeat(1, columns),
            "label": t["incoming"],
        }[loss.target]
    if loss.weight == "classes":
        options["weight"] = t["weight"]
    value, grads = mbkern.loss_and_grad(
        loss.name, *tensors, **options, argnums=loss.differentiable, reduction="none"
    )
    return value, *grads


CALLS = [
    every_loss_of_rows,
    every_elementwise_loss,
    fresh,
    in_place,
    accumulate,
    everything,
    backward,
    softcap_backward,
    probabilities,
    by_columns,
    pointwise,
    pointwise_buffer,
]


def guarded(arena: Arena, call: Callable, columns: int, dtype: torch.dtype, slack: int) -> None:
    """One call, with all tensors near the guards behind them and then near those before them."""
    tensors = rows(columns, dtype)
    want = call({name: tensor.clone() for name, tensor in tensors.items()})
    for back in (True, False):
        what = f"{call.__name__}, {columns} columns, {dtype}, {_C.isa()}, {slack=}, {back=}"
        arena.start(slack, back)
        placed = {name: arena.copy(tensor) for name, tensor in tensors.items()}
        with arena.allocating():
            got = call(placed)
        assert all(map(same_bits, got, want)), f"{what}: memory beside the tensors was used"
        arena.check(what)


@pytest.fixture(scope="module")
def warm() -> None:
    """Torch imports much at the first use of a Function; children need not repeat that."""
    for call in CALLS:
        call(rows(5, torch.float32))


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _C.isas())
def test_guard_pages_at_every_tail(isa: str, dtype: torch.dtype) -> None:
    def calls() -> None:
        _C.set_isa(isa)
        arena = Arena(20, 3 * 131 * 8)
        for columns in range(1, 131):
            for call in CALLS[columns % 5 :: 5]:
                guarded(arena, call, columns, dtype, 0)

    in_child(calls)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _C.isas())
def test_guard_pages_at_every_alignment(isa: str, dtype: torch.dtype) -> None:
    def calls() -> None:
        _C.set_isa(isa)
        arena = Arena(20, 3 * 131 * 8)
        choice = itertools.cycle(CALLS)
        for columns in (1, 64, 130):
            for slack in range(0, 64, dtype.itemsize):
                guarded(arena, next(choice), columns, dtype, slack)

    in_child(calls)


def test_guard_pages_with_threads() -> None:
    """The ranges of the threads end inside the tensors, and cover them."""
    before = torch.get_num_threads()
    arena = Arena(4, 4 * 601 * 1003)
    try:
        torch.set_num_threads(3)
        for shape in ((6007, 10), (601, 1003)):
            arena.start(0, True)
            x = arena.copy(torch.linspace(-4, 4, shape[0] * shape[1]).view(shape))
            target = arena.copy(torch.arange(shape[0]) % shape[1])
            with arena.allocating():
                mbkern.loss_and_grad("cross_entropy", x, target, reduction="none")
            arena.check(str(shape))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_elements(dtype: torch.dtype) -> None:
    for shape in ((0, 5), (0, 700), (0, 5, 3), (4, 5, 0)):
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
        loss, grad = mbkern.loss_and_grad(
            "cross_entropy", torch.empty(shape, dtype=dtype), target, reduction="sum"
        )
        assert loss.item() == 0
        assert grad.shape == shape
    x = torch.empty(3, 0, dtype=dtype)
    with pytest.raises(IndexError, match="target 0"):
        mbkern.loss_and_grad("cross_entropy", x, torch.zeros(3, dtype=torch.int64))
    loss, grad = mbkern.loss_and_grad("mse_loss", x, x.clone(), reduction="sum")
    assert loss.item() == 0
    assert grad.shape == (3, 0)


# ---- more than 2^31 elements ---------------------------------------------------------------------


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written."""
    size = elements * dtype.itemsize
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < size:
        pytest.skip(f"NOT CHECKED: the limit on address space is {limit} bytes; {size} are needed")
    try:
        address = map_anonymous(size, MAP_NORESERVE)
    except MemoryError as error:
        pytest.skip(f"NOT CHECKED: {size} bytes of sparse memory cannot be mapped: {error}")
    return torch.from_numpy(bytes_at(address, size)).view(dtype)


def unmap(tensor: Tensor) -> None:
    assert LIBC.munmap(tensor.data_ptr(), tensor.nbytes) == 0


def test_rows_beyond_two_to_the_31() -> None:
    """All items are ignored but the last; ignored rows are not read."""
    items, columns = (1 << 24) + 3, 130
    flat = sparse(items * columns, torch.bfloat16)
    x = flat.view(items, columns)
    x[-1] = torch.linspace(-2, 2, columns)
    target = torch.full((items,), -1, dtype=torch.int8)
    target[-1] = 100
    got = F.cross_entropy(x, target, reduction="sum", ignore_index=-1, loss_dtype=torch.float32)
    want = F.cross_entropy(x[-1:].clone(), target[-1:], loss_dtype=torch.float32)
    assert got.item() == want.item() != 0
    target[-1] = -128
    with pytest.raises(IndexError, match=f"-128 at flat index {items - 1}"):
        F.cross_entropy(x, target, ignore_index=-1)
    unmap(flat)


LARGE = 1 << 25  # bytes of a gradient from which on it is written past the caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize(
    ("loss", "columns"), [("huber_loss", 0), ("dice_loss", 4160), ("dice_loss", 4111)]
)
def test_gradients_too_large_for_a_cache(
    isa: str, dtype: torch.dtype, offset: int, loss: str, columns: int
) -> None:
    size = LARGE // dtype.itemsize + 5
    shape = (-(-size // columns), columns) if columns else (size,)
    size = math.prod(shape)
    memory = torch.empty(size + 80, dtype=dtype)
    lead = (-memory.data_ptr() // dtype.itemsize) % 64 + offset
    outside = [memory[:lead], memory[lead + size :]]
    for part in outside:
        part.fill_(7.0)
    x = torch.linspace(0, 1, size, dtype=dtype).view(shape)
    target = torch.linspace(1, 0.2, size, dtype=dtype).view(shape)
    grad = memory[lead : lead + size].fill_(float("nan")).view(shape)
    mbkern.loss_and_grad(loss, x, target, grad_out=grad, reduction="sum")
    step = (1 << 20) // (columns or 1)
    pieces = [
        mbkern.loss_and_grad(loss, *pair, reduction="sum")[1]
        for pair in zip(x.split(step), target.split(step), strict=True)
    ]
    assert torch.equal(grad, torch.cat(pieces))
    assert all((part == 7.0).all() for part in outside)


@pytest.mark.parametrize("columns", [5, 600])
def test_strides_beyond_two_to_the_31(columns: int) -> None:
    """Offsets of rows and columns, in input, gradient and target, that do not fit into 32 bits."""
    step = (1 << 31) // (columns - 1) + 3
    flat = sparse((columns - 1) * step + 3, torch.bfloat16)
    other = sparse((columns - 1) * step + 3, torch.bfloat16)
    x, grad = (t.as_strided((3, columns), (1, step)) for t in (flat, other))
    x.copy_(torch.linspace(-2, 2, 3 * columns).view(3, columns))
    target = torch.tensor([0, columns - 1, columns // 2])
    want_loss, want = mbkern.loss_and_grad("cross_entropy", x.contiguous(), target)
    loss, _ = mbkern.loss_and_grad("cross_entropy", x, target, grad_out=grad)
    assert torch.equal(loss, want_loss)
    assert torch.equal(grad, want)
    buffer = sparse((1 << 31) * 2 + columns, torch.float32)
    wide = buffer.as_strided((3, columns), (1 << 31, 1))
    mbkern.loss_and_grad("cross_entropy", x, target, grad_out=wide, accumulate=True)
    assert torch.equal(wide.bfloat16(), want)
    for tensor in (flat, other, buffer):
        unmap(tensor)


def test_elements_beyond_two_to_the_31() -> None:
    size = (1 << 31) + 12345
    flat = sparse(size, torch.bfloat16)
    flat[5], flat[-1] = 3.0, 4.0
    loss = F.mse_loss(flat[1:], flat[:-1], reduction="sum", loss_dtype=torch.float64)
    assert loss.item() == 9 + 9 + 16
    unmap(flat)
