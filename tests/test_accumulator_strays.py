"""Gradients beside an accumulator's own: those of others are neither lost nor taken for its own."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from mbkern import GradAccumulator, _accumulator_flush

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def ones(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("mode", ["deferred", "streaming"])
@pytest.mark.parametrize("micro_batches", [0, 1])
def test_flush_does_not_overwrite_what_a_backward_outside_left(
    mode: str, micro_batches: int
) -> None:
    p = ones()
    acc = GradAccumulator([p], mode=mode)
    for _ in range(micro_batches):
        acc.backward(p.sum(), 1)
    (10 * p).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"parameter 0 has a gradient of a backward outside"):
        acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [10 + (micro_batches if mode == "streaming" else 0)] * 2
    p.grad = None
    assert acc.flush().micro_batches == micro_batches
    assert (p.grad is None) == (micro_batches == 0)


@pytest.mark.parametrize("what", ["load_state_dict", "keep_partial"])
def test_nor_does_what_renews_a_streaming_gradient(what: str) -> None:
    p = ones()
    acc = GradAccumulator([p], mode="streaming")
    acc.backward(p.sum(), 1)
    state = acc.state_dict()
    with suppress(KeyError), acc.micro_batch(1):
        acc.buffer(p).add_(1.0)
        raise KeyError
    p.sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="backward outside"):
        getattr(acc, what)(*[state] * (what == "load_state_dict"))
    assert p.grad is not None
    assert p.grad.tolist() == [1, 1]
    p.grad = None
    getattr(acc, what)(*[state] * (what == "load_state_dict"))
    assert p.grad.tolist() == [1, 1]  # the mean of one micro-batch, or of two


def test_nor_that_of_a_parameter_unfrozen_since() -> None:
    p = ones().requires_grad_(False)
    acc = GradAccumulator([p])
    p.requires_grad_(True)
    p.sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="backward outside"):
        acc.flush()


def test_nor_a_sparse_one() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    acc = GradAccumulator(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="backward outside"):
        acc.flush()


def test_main_grad_leaves_grad_alone() -> None:
    p = ones()
    acc = GradAccumulator([p], into="main_grad")
    acc.backward(p.sum(), 1)
    (10 * p).sum().backward()  # type: ignore[no-untyped-call]
    acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [10, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_accumulators_take_turns_at_one_parameter(dtype: torch.dtype) -> None:
    """What another has flushed or collected is no stray, in whatever order the hooks come."""
    p = ones(dtype)
    accs = [GradAccumulator([p]) for _ in range(2)]
    for k in (0, 1, 0):
        accs[k].backward((k + 1) * p.sum(), 1)
    for k in (0, 1):
        accs[k].flush()
        assert p.grad is not None
        assert p.grad.tolist() == [k + 1] * 2
    for acc in accs:
        p.sum().backward()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="backward outside"):
            acc.flush()


def test_a_main_grad_of_others_is_left_alone() -> None:
    p = ones()
    one, other = (GradAccumulator([p], into="main_grad") for _ in range(2))
    for k, acc in enumerate((one, other)):
        acc.backward((k + 1) * p.sum(), 1)
        acc.flush()
    one.backward(p.sum(), 1)  # its own main_grad is gone, and that there is the other's
    assert p.main_grad.tolist() == [2, 2]


@pytest.mark.parametrize("set_to_none", [None, False, True])
def test_main_grad_given_to_the_optimizer_as_grad(set_to_none: bool | None) -> None:
    """Both are the buffer then: autograd must not add to it in the next window."""
    p = ones()
    acc = GradAccumulator([p], into="main_grad")
    optimizer = torch.optim.SGD([p], lr=0.0)
    for k in range(1, 4):
        acc.backward((k * p).sum(), 1)
        acc.flush()
        assert p.main_grad.tolist() == [k, k]
        p.grad = p.main_grad
        optimizer.step()
        if set_to_none is not None:
            optimizer.zero_grad(set_to_none)


def test_the_last_gradient_stays_where_a_window_was_not_begun() -> None:
    p = ones()
    acc = GradAccumulator([p], mode="known")
    acc.begin(2)
    acc.backward(p.sum())
    acc.flush()
    with pytest.raises(RuntimeError, match=r"needs begin"):
        acc.backward(p.sum())
    assert p.grad is not None
    assert p.grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("measure", [False, True])
def test_gradients_made_in_inference_mode_may_be_written_to(
    dtype: torch.dtype, measure: bool
) -> None:
    p = ones(dtype)
    with torch.inference_mode():
        acc = GradAccumulator([p], measure=measure)
        buffer = acc.buffer(p)
    buffer.add_(1.0)
    acc.backward(p.sum(), 1)
    with torch.inference_mode():
        acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [2, 2]
    torch.optim.SGD([p], lr=0.0).zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0, 0]


def test_a_flush_that_failed_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums may have been divided: a second one would divide them again."""
    p = ones()
    acc = GradAccumulator([p], denominators=("a", "b"))
    acc.backward(p.sum(), 2, "a")

    def full(*_: object, **__: object) -> None:
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(_accumulator_flush, "_target", full)
        with pytest.raises(MemoryError):
            acc.flush()
    for use in (acc.flush, acc.state_dict, acc.keep_partial):
        with pytest.raises(RuntimeError, match=r"flush\(\) failed \(MemoryError: full\).* window$"):
            use()
    acc.reset()
    acc.backward(p.sum(), 2, "a")
    acc.flush()
    assert p.grad is not None
    assert p.grad.tolist() == [0.5, 0.5]
