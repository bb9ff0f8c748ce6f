"""What GradAccumulator is given: counts of every kind, names, parameters, scales."""

from __future__ import annotations

import decimal
import fractions
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mbkern import GradAccumulator

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

THREES: list[Any] = [
    3, 3.0, np.float16(3), np.float32(3), np.int8(3), np.array(3.0), decimal.Decimal(3),
    fractions.Fraction(3), torch.tensor(3, dtype=torch.uint8), torch.tensor(3.0).half(),
]  # fmt: skip


def wide() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("three", THREES, ids=lambda three: type(three).__name__)
@pytest.mark.parametrize("mode", ["deferred", "streaming", "known"])
def test_a_count_of_every_kind_divides_in_full_precision(mode: str, three: Any) -> None:
    p = wide()
    acc = GradAccumulator([p], dtype=torch.float64, mode=mode, measure=True)
    if mode == "known":
        acc.begin(three)
    acc.backward(p.sum(), three)
    # NumPy's numbers are not among what torch.load takes by itself.
    file = io.BytesIO()
    torch.save(acc.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    acc.load_state_dict(state)
    stats = acc.flush()
    assert stats.sizes == {0: 3}
    assert p.grad is not None
    assert p.grad.tolist() == [1 / 3, 1 / 3]


@pytest.mark.parametrize("mode", ["deferred", "known"])
def test_an_array_is_read_at_once(mode: str) -> None:
    p, count = wide(), np.array(2.0)
    acc = GradAccumulator([p], mode=mode, measure=True)
    if mode == "known":
        acc.begin(count)
    acc.backward(p.sum(), None if mode == "known" else count)
    count[...] = 99
    assert acc.flush().sizes == ({} if mode == "known" else {0: 2})
    assert p.grad is not None
    assert p.grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "count",
    [b"3", bytearray(b"3"), 10**400, torch.tensor(3, device="meta"), torch.tensor(3.0).to_sparse()],
    ids=["bytes", "bytearray", "huge", "meta", "sparse"],
)
def test_what_is_no_count_is_refused_where_it_is_given(count: Any) -> None:
    p = wide()
    acc, known = GradAccumulator([p]), GradAccumulator([p], mode="known")
    with pytest.raises(ValueError, match=r"^mbkern: count is .{1,140}$"):
        acc.backward(p.sum(), count)
    with pytest.raises(ValueError, match=r"^mbkern: total is .{1,140}$"):
        known.begin(count)
    assert acc.flush().micro_batches == 0


CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: GradAccumulator([(wide(),)]), TypeError, "pair of a name and a tensor, not of Param"),
    (lambda: GradAccumulator([("a", wide(), 1)]), TypeError, "not of str, Parameter, int"),
    (lambda: GradAccumulator([(1, wide())]), TypeError, "not of int, Parameter"),
    (lambda: GradAccumulator([(wide(), "a")]), TypeError, "not of Parameter, str"),
    (lambda: GradAccumulator({wide(), wide()}), TypeError, "parameters must be .* not set"),
    (lambda: GradAccumulator([{"params": None}]), TypeError, "params.* not NoneType"),
    (lambda: GradAccumulator([{"params": {wide()}}]), TypeError, "params.* not set"),
    (lambda: GradAccumulator([wide()], denominators={"a", "b"}), ValueError, "sequence of diff"),
    (lambda: GradAccumulator([wide()], denominators=("a", 1)), ValueError, "sequence of diff"),
    (lambda: GradAccumulator([wide()], denominators=iter("ab")), ValueError, "sequence of diff"),
    (lambda: GradAccumulator([wide()], pre_scale=0.3), ValueError, "a power of two"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_refused_by_name(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^mbkern: .*{message}"):
        call()


@pytest.mark.parametrize(("exponent", "good"), [(-25, False), (-24, True), (15, True), (16, False)])
def test_a_scale_that_the_loss_cannot_hold(exponent: int, good: bool) -> None:
    """The gradients would all be 0, or infinite."""
    p = nn.Parameter(torch.full((2,), 2.0**-16, dtype=torch.float16))
    acc = GradAccumulator([p], pre_scale=2.0**exponent)
    if not good:
        with pytest.raises(ValueError, match=r"pre_scale=.* (0|infinite) in .* torch\.float16"):
            acc.backward(p.sum(), 1)
        return
    acc.backward(p.sum(), 1)
    acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [1, 1]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_count_is_that_of_the_start_of_the_block(kind: Callable[[float], Any]) -> None:
    p, count = wide(), kind(2.0)
    acc = GradAccumulator([p], measure=True)
    with acc.micro_batch(count):
        p.sum().backward()  # type: ignore[no-untyped-call]
        count += 97
    stats = acc.flush()
    assert float(stats.sizes[0]) == float(stats.counts[""]) == 2
