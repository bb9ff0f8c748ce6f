"""Element-wise losses in bf16 and fp16: plain arrays are converted on the way, other layouts and
ragged ends through a copy. Both ways are the fp32 loss of the widened inputs, with gradients that
are rounded once."""

from __future__ import annotations

import pytest
import torch
from case import Case, Variation
from element_cases import ELEMENT_CASES
from torch import Tensor

import mbkern

DTYPES = [torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 88.0, -88.0, 3e4, 1e-7, -6e-8, torch.inf, -torch.inf, torch.nan]
LAYOUTS = ["plain", "in place", "odd beginnings", "every other"]
# Around a vector, the vectors of a step, a chunk and a task.
SIZES = (1, 15, 64, 480, 512, 1023, 16384 + 512, 33000)
VARIATIONS = [(case, variation) for case in ELEMENT_CASES for variation in case.variations]
LARGE = 1 << 25  # bytes of a gradient from which on it is written past the caches


def _placed(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "odd beginnings":
        memory = tensor.new_full((tensor.numel() + 2,), 7.0)
        memory[1:-1] = tensor
        return memory[1:-1]
    if layout == "every other":
        memory = tensor.new_full((tensor.numel(), 2), 7.0)
        memory[:, 1] = tensor
        return memory[:, 1]
    return tensor.clone()


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("case", "variation"), VARIATIONS, ids=[f"{c.name}-{v.name}" for c, v in VARIATIONS]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_in_fp32(isa: str, dtype: torch.dtype, case: Case, variation: Variation) -> None:
    for size in SIZES:
        sample = case.sample((size,), dtype, variation)
        names = [name for name in case.differentiable if name in case.tensors(sample)]
        options = {k: v for k, v in sample.options.items() if k not in case.tensors(sample)}
        wide_options = {
            k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()
        } | {"loss_dtype": torch.float32}
        options["loss_dtype"] = torch.float32
        wide = {name: tensor.float() for name, tensor in case.tensors(sample).items()}
        for reduction in ("mean", "none"):
            for argnums in (names[:1], names):
                want_loss, want = mbkern.loss_and_grad(
                    case.name, **wide, argnums=tuple(argnums), reduction=reduction, **wide_options
                )
                for layout in LAYOUTS:
                    tensors = {n: _placed(t, layout) for n, t in case.tensors(sample).items()}
                    out = tuple(
                        tensors[name]
                        if layout == "in place"
                        else _placed(torch.full_like(sample.input, torch.nan), layout)
                        for name in argnums
                    )
                    loss, grads = mbkern.loss_and_grad(
                        case.name, **tensors, argnums=tuple(argnums), reduction=reduction,
                        grad_out=out, **options,
                    )  # fmt: skip
                    assert torch.equal(loss, want_loss), (size, reduction, layout)
                    for grad, exact in zip(grads, want, strict=True):
                        assert torch.equal(grad, exact.to(dtype)), (size, reduction, layout)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def _rounded_bits(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the numbers in ``dtype``, with the one NaN: torch's own conversion makes another."""
    nan = 0x7FC0 if dtype is torch.bfloat16 else 0x7E00
    return torch.where(wide.isnan(), nan, _bits(wide.to(dtype)))


@pytest.mark.cpu
@pytest.mark.parametrize("case", ELEMENT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_as_in_fp32(isa: str, dtype: torch.dtype, case: Case) -> None:
    """Pairwise, with plain gradients, gradients of another type, and accumulated ones."""
    special = [v for v in SPECIAL if 0 <= v <= 1 or case.name != "binary_cross_entropy"]
    values = torch.tensor(special * 16)[:64]
    sample = case.sample((64 * 64,), dtype, case.variations[0])
    tensors = case.tensors(sample)
    first, second, *_ = tensors
    tensors[first] = values.repeat_interleave(64).to(dtype)
    tensors[second] = values.repeat(64).to(dtype)
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    losses, want = mbkern.loss_and_grad(
        case.name, **wide, reduction="none", loss_dtype=torch.float32
    )
    numbers = want.isfinite()
    for options in ({"reduction": "none"}, {"reduction": "sum"}):
        got, grad = mbkern.loss_and_grad(case.name, **tensors, **options, loss_dtype=torch.float32)
        assert torch.equal(_bits(grad), _rounded_bits(want, dtype))
        if options["reduction"] == "none":
            assert torch.equal(_bits(got), _bits(losses))
    mixed = tensors | {second: wide[second]}
    _, grad = mbkern.loss_and_grad(case.name, **mixed, reduction="sum")
    assert torch.equal(_bits(grad), _rounded_bits(want, dtype))
    buffer = torch.full(grad.shape, 0.25)
    mbkern.loss_and_grad(case.name, **tensors, reduction="sum", grad_out=buffer, accumulate=True)
    assert torch.equal(_bits(buffer[numbers]), _bits((want + 0.25)[numbers]))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
def test_gradients_that_no_cache_keeps(isa: str, dtype: torch.dtype, offset: int) -> None:
    size = LARGE // dtype.itemsize
    memory = torch.full((size + 128,), 7.0, dtype=dtype)
    lead = (-memory.data_ptr() // dtype.itemsize) % 64 + offset
    grad = memory[lead : lead + size]
    x = torch.linspace(-3, 3, size).to(dtype)
    target = torch.linspace(0, 1, size).to(dtype)
    mbkern.loss_and_grad("huber_loss", x, target, grad_out=grad, reduction="sum")
    pairs = zip(x.split(1 << 20), target.split(1 << 20), strict=True)
    pieces = [mbkern.loss_and_grad("huber_loss", *pair, reduction="sum")[1] for pair in pairs]
    assert torch.equal(grad, torch.cat(pieces))
    assert (memory[:lead] == 7.0).all()
    assert (memory[lead + size :] == 7.0).all()
