"""GradAccumulator in random windows, each compared with plain sums in fp64; and what they found."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from accumulator_happenings import play
from torch import Tensor, nn

from mbkern import GradAccumulator

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_random_windows_are_what_the_model_says(first: int) -> None:
    for seed in range(first, first + 10):
        play(seed)


def test_layout_threads_buckets_and_streaming_change_no_bit() -> None:
    """Of gradients, norms, penalties and clipping, through whole sequences of windows."""
    for seed in range(2000, 2020):
        plain = play(seed)
        ways: list[dict[str, Any]] = [{"layout": "parameter", "bucket": 1}]
        if plain.mode != "known":
            other = "streaming" if plain.mode == "deferred" else "deferred"
            ways.append({"mode": other})
        for way in ways:
            torch.set_num_threads(2)
            found = play(seed, **way).found
            torch.set_num_threads(1)
            assert len(found) == len(plain.found)
            for a, b in zip(plain.found, found, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- each by itself ------------------------------------------------------------------------------
#
# What longer runs of the above have found.


def ones(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=dtype))


def copied(acc: GradAccumulator) -> tuple[GradAccumulator, Tensor]:
    other = copy.deepcopy(acc)
    return other, other._members.slots[0].parameter


def test_float64_buffers_of_a_bfloat16_parameter() -> None:
    """Refused when they are asked for, not when a window is to be written; main_grad takes them."""
    p = ones(torch.bfloat16)
    with pytest.raises(TypeError, match=r"^mbkern: .*bfloat16.*buffers of float64"):
        GradAccumulator([p], dtype=torch.float64)
    acc = GradAccumulator([p], dtype=torch.float64, into="main_grad")
    acc.backward(p.sum(), 1)
    acc.flush()
    assert p.main_grad.dtype == torch.float64


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_a_copy_gives_fp32_gradients_too() -> None:
    acc, p = copied(GradAccumulator([ones(torch.bfloat16)], into="fp32_grad"))
    acc.backward(p.sum(), 1)
    acc.flush()
    assert p.grad is not None
    assert p.grad.dtype == torch.float32


def test_a_copy_has_what_a_kernel_added_between_micro_batches() -> None:
    p = ones()
    acc = GradAccumulator([p], measure=True)
    acc.backward(p.sum(), 1)
    acc.buffer(p).add_(10.0)
    other, q = copied(acc)
    other.flush()
    assert q.grad.tolist() == [11, 11]


def test_a_copy_goes_on_measuring() -> None:
    p = ones()
    acc = GradAccumulator([p], measure=True)
    with acc.micro_batch(1):
        acc.buffer(p).add_(1.0)
    other, q = copied(acc)
    other.backward(q.sum(), 1)
    assert len(other.flush().micro_batch_norms()) == 2


def test_a_copy_knows_its_module_in_whatever_order_they_are_copied() -> None:
    net = nn.Linear(2, 1, bias=False)
    acc, other = copy.deepcopy((GradAccumulator(net), net))
    other.weight = nn.Parameter(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="does not know"):
        acc.backward(other(torch.ones(1, 2)).sum(), 1)


@pytest.mark.parametrize("layout", ["parameter", "flat"])
def test_asking_for_two_buffers_adds_nothing(layout: str) -> None:
    p, q = ones(), ones()
    acc = GradAccumulator([p, q], layout=layout)
    with suppress(KeyError), acc.micro_batch(1):
        acc.buffer(p)
        acc.buffer(q)
        raise KeyError
    acc.flush()  # the window is as it was: whole


def test_a_large_loss_scale_is_divided_out_of_norms() -> None:
    p = ones()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**70)
    acc = GradAccumulator([p], measure=True)
    acc.backward(scaler.scale(p.sum()), 1)
    stats = acc.flush(scaler, torch.optim.SGD([p], lr=0.0))
    assert p.grad.tolist() == [1, 1]
    assert stats.micro_batch_norms()[0].item() == pytest.approx(2**0.5)


def test_what_a_kernel_adds_last_in_known_mode_is_not_measured() -> None:
    p = ones()
    acc = GradAccumulator([p], mode="known", measure=True)
    acc.begin(1)
    acc.backward(p.sum())
    acc.buffer(p).add_(1.0)
    assert not acc.flush().measured_whole


@pytest.mark.parametrize("how", ["failed", "partial", "loaded"])
def test_streaming_is_valid_after_a_failure_or_a_state(how: str) -> None:
    p = ones()
    acc = GradAccumulator([p], mode="streaming")
    acc.backward(p.sum(), 1)
    if how == "loaded":
        acc.load_state_dict(acc.state_dict())
    else:
        with suppress(KeyError), acc.micro_batch(1):
            if how == "partial":
                acc.buffer(p).add_(1.0)
            raise KeyError
        acc.keep_partial()
    assert p.grad is not None
    assert p.grad.tolist() == [1, 1]


def test_there_is_a_norm_of_each_micro_batch() -> None:
    p, elsewhere = ones(), ones()
    acc = GradAccumulator([p], measure=True)
    for loss in (p.sum(), elsewhere.sum(), 3 * p.sum()):
        acc.backward(loss, 1)
    norms = [float(n) ** 2 for n in acc.flush().micro_batch_norms()]
    assert norms == pytest.approx([2, 0, 18])


def test_a_second_module_replaces_its_parameters_too() -> None:
    one, two = (nn.Linear(2, 1, bias=False) for _ in "ab")
    acc = GradAccumulator(one)
    acc.add(two)
    two.weight = nn.Parameter(torch.ones(1, 2))
    acc.add(two)
    assert {id(slot.parameter) for slot in acc._members.all} == {id(one.weight), id(two.weight)}


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_a_parameter_that_could_not_be_unfrozen_is_so_later() -> None:
    p = ones(torch.bfloat16).requires_grad_(False)
    acc = GradAccumulator([p], into="fp32_grad")
    p.requires_grad_(True)
    p.sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient"):  # it is in the way
        acc.backward(p.sum(), 1)
    p.grad = None
    acc.backward(p.sum(), 1)
    acc.state_dict()


def test_the_order_of_the_norm_does_not_depend_on_denominators() -> None:
    p, q = ones(), ones()
    acc = GradAccumulator([("p", p), ("q", q)], denominators=("ce", "aux"))
    acc.backward(q.sum(), 1, "ce")
    acc.backward(p.sum(), 1, "aux")
    assert list(acc.flush().squared_norms) == ["p", "q"]


def test_a_scaler_and_no_parameters() -> None:
    acc = GradAccumulator([])
    stats = acc.flush(torch.amp.GradScaler("cpu"), torch.optim.SGD([ones()], lr=0.0))
    assert stats.found_inf == 0
