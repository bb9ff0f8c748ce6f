"""Parameters that an optimizer gets later: none is stepped by sums that nobody has normalised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mbkern import GradAccumulator

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
NEW = r"\(3,\) torch\.float32.* in group 1"


def three() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def test_a_group_added_to_those_that_were_given_is_an_error_until_it_is_known() -> None:
    p, q = three(), three()
    optimizer = torch.optim.SGD([p], lr=0.5)
    acc = GradAccumulator(optimizer.param_groups)
    optimizer.add_param_group({"params": [q]})
    with pytest.raises(RuntimeError, match=rf"{NEW}; they were added since .*call add\(optimizer"):
        acc.backward((p + q).sum(), 4)
    acc.add(optimizer.param_groups)
    for _ in range(2):
        acc.backward((p + q).sum(), 4)
    acc.flush(optimizer=optimizer)
    assert p.grad is not None
    assert q.grad is not None
    assert (p.grad.tolist(), q.grad.tolist()) == ([0.25] * 3, [0.25] * 3)


def test_nor_is_one_added_in_mid_window_left_out() -> None:
    p, q = three(), three()
    optimizer = torch.optim.SGD([p], lr=0.5)
    acc = GradAccumulator(optimizer.param_groups)
    acc.backward(p.sum(), 4)
    optimizer.add_param_group({"params": q})
    with pytest.raises(RuntimeError, match=NEW):
        acc.flush()
    acc.add(optimizer.param_groups)
    acc.flush()
    assert p.grad is not None
    assert q.grad is None


def test_a_frozen_one_is_none_of_them() -> None:
    p, q = three(), three().requires_grad_(False)
    optimizer = torch.optim.SGD([p], lr=0.5)
    acc = GradAccumulator(optimizer.param_groups)
    optimizer.add_param_group({"params": [q]})
    acc.backward(p.sum(), 4)
    acc.flush(optimizer=optimizer)


@pytest.mark.parametrize("several", [False, True])
def test_flush_refuses_what_the_optimizer_would_step_by_plain_sums(several: bool) -> None:
    """Of an accumulator that was given parameters: the optimizer is seen by ``flush``."""
    p, q = three(), three()
    optimizer = torch.optim.SGD([p], lr=0.5)
    acc = GradAccumulator([p])
    optimizer.add_param_group({"params": [q]})
    for _ in range(2):
        acc.backward((p + q).sum(), 4)
    with pytest.raises(RuntimeError, match=rf"does not know, plain sums: {NEW}"):
        acc.flush(optimizer=[optimizer] if several else optimizer)
    assert q.grad is not None
    assert (p.grad, q.grad.tolist()) == (None, [2] * 3)
    q.grad = None
    acc.flush(optimizer=optimizer)
    assert p.grad is not None
    assert p.grad.tolist() == [0.25] * 3


def test_one_optimizer_may_step_what_two_accumulators_have() -> None:
    p, q = three(), three()
    optimizer = torch.optim.SGD([p, q], lr=0.5)
    first, second = GradAccumulator([p]), GradAccumulator([q])
    first.backward(p.sum(), 2)
    second.backward(q.sum(), 4)
    first.flush(optimizer=optimizer)
    second.flush(optimizer=optimizer)
    assert p.grad is not None
    assert q.grad is not None
    assert (p.grad.tolist(), q.grad.tolist()) == ([0.5] * 3, [0.25] * 3)


def test_a_copy_looks_at_the_copied_groups() -> None:
    p = three()
    optimizer = torch.optim.SGD([p], lr=0.5)
    acc = GradAccumulator(optimizer.param_groups)
    other, own = copy.deepcopy((optimizer, acc))
    other.add_param_group({"params": [three()]})
    acc.backward(p.sum(), 1)
    with pytest.raises(RuntimeError, match=NEW):
        own.flush()
