"""What crosses from Python to the kernels: numbers that are none, tiny factors, signs, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mbkern
from mbkern import functional as F

pytestmark = pytest.mark.cpu
LOGITS = torch.linspace(-2, 2, 12).view(3, 4)
CLASSES = torch.tensor([0, 1, -1])


@pytest.fixture
def flush_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("NOT CHECKED: this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("bad", [None, "a", 1.5, 2**70])
@pytest.mark.parametrize(
    "beside", [{"denominator": torch.tensor(4.0)}, {"scale": torch.tensor(2.0)}]
)
def test_a_bad_class_is_refused_beside_a_number_on_its_device(bad: Any, beside: Any) -> None:
    with pytest.raises((TypeError, OverflowError, ValueError)):
        mbkern.loss_and_grad("cross_entropy", LOGITS, CLASSES, ignore_index=bad, **beside)


@pytest.mark.parametrize("bad", [None, "a", [1], 10**400])
def test_a_bad_number_is_refused_beside_a_number_on_its_device(bad: Any) -> None:
    with pytest.raises((TypeError, OverflowError, ValueError)):
        F.cross_entropy(LOGITS, CLASSES.abs(), z_loss=bad, denominator=torch.tensor(4.0))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("z_loss", lambda big: F.cross_entropy(LOGITS, CLASSES.abs(), z_loss=big)),
        ("delta", lambda big: F.huber_loss(LOGITS, LOGITS, delta=big)),
        ("denominator", lambda big: F.mse_loss(LOGITS, LOGITS, denominator=big)),
        ("alpha", lambda big: mbkern.accumulate_([LOGITS.clone()], [LOGITS], alpha=big)),
        ("ignore_index", lambda big: F.cross_entropy(LOGITS, CLASSES, ignore_index=big)),
        ("ignore_index", lambda big: F.nll_loss(LOGITS, CLASSES, ignore_index=big)),
    ],
)
def test_integers_without_end_are_refused_by_name(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=f"mbkern: {name} (is too large|must have 64 bits)"):
        call(10**5000)


def test_nothing_is_computed_of_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.randn(3, 4)
        for name, target in (("mse_loss", x), ("cross_entropy", torch.zeros(3, dtype=torch.int64))):
            with pytest.raises(NotImplementedError, match="under FakeTensorMode"):
                mbkern.loss_and_grad(name, x, target)


@pytest.mark.usefixtures("flush_denormals")
@pytest.mark.parametrize(
    ("dtype", "incoming"), [(torch.float16, 2**-15), (torch.float32, 2.0**-130)]
)
def test_a_small_incoming_gradient_is_not_flushed(dtype: torch.dtype, incoming: float) -> None:
    x = LOGITS.clone().requires_grad_()
    factor = torch.full((), incoming, dtype=torch.float64)
    torch.set_flush_denormal(False)
    factor = factor.to(dtype)
    torch.set_flush_denormal(True)
    F.mse_loss(x, torch.zeros(3, 4), reduction="sum", loss_dtype=dtype).backward(factor)
    assert x.grad is not None
    torch.set_flush_denormal(False)
    assert torch.equal(x.grad, LOGITS * 2 * incoming)


def negated(size: int) -> Tensor:
    return torch.complex(torch.zeros(size), -torch.ones(size)).conj().imag


def test_lists_refuse_to_write_to_negated_views() -> None:
    grads = [torch.ones(3)]
    with pytest.raises(ValueError, match=r"buffers\[0\] is a lazily negated view"):
        mbkern.accumulate_([negated(3)], grads)
    with pytest.raises(ValueError, match=r"grads\[0\] is a lazily negated view"):
        mbkern.flush_([negated(3)], grads)
    with pytest.raises(ValueError, match=r"buffers\[0\] is a lazily negated view"):
        mbkern.accumulate_([negated(1)], [torch.ones(1)])


@pytest.mark.parametrize("name", ["dice_loss", "cross_entropy"])
def test_memory_is_for_the_threads_that_work(name: str) -> None:
    x, threads = torch.zeros(1, 1 << 22), torch.get_num_threads()
    target = x.clone() if name == "dice_loss" else torch.tensor([1])
    torch.set_num_threads(1000)  # of one row; 50 MB for each would be 50 GB
    try:
        loss = getattr(F, name)(x, target)
    finally:
        torch.set_num_threads(threads)
    assert math.isfinite(loss)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_float64_is_rounded_to_16_bits_once(dtype: torch.dtype, bits: int) -> None:
    above_the_middle = 1 + 2.0 ** -(bits + 1) + 2.0**-30  # in float32 it is the middle
    x = torch.tensor([above_the_middle], dtype=torch.float64)
    loss = F.l1_loss(x, torch.zeros_like(x), reduction="none", loss_dtype=dtype)
    _, grad = mbkern.loss_and_grad(
        "half_squared_error", torch.zeros(1, dtype=dtype), -x, reduction="sum"
    )
    assert loss.item() == grad.item() == 1 + 2.0**-bits


@pytest.mark.parametrize("columns", [50, 2000])
@pytest.mark.parametrize("label", [1.0, -1.0, 1 + 1e-10])
def test_labels_in_float64_are_not_rounded(columns: int, label: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, columns, generator=g) for _ in range(2))
    labels = torch.full((2,), label, dtype=torch.float64)
    torch.testing.assert_close(
        F.cosine_embedding_loss(x, y, labels),
        torch.nn.functional.cosine_embedding_loss(x, y, labels),
    )


def test_a_cap_beyond_float32_caps_nothing() -> None:
    classes = CLASSES.abs()
    assert torch.equal(
        F.cross_entropy(LOGITS, classes, softcap=1e40), F.cross_entropy(LOGITS, classes)
    )


def test_a_number_beside_a_buffer_in_its_memory() -> None:
    memory = torch.ones(10)
    mbkern.accumulate_([memory[1:]], [torch.ones(9)], alpha=memory[0])
    assert torch.equal(memory, torch.tensor([1.0, *[2.0] * 9]))
