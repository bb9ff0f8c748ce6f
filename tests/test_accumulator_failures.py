"""mbkern.GradAccumulator when something fails, is missing or wrong: nothing is lost silently."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from windows import Failing, Problem, gradients, model

from mbkern import GradAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test says otherwise


def test_others_may_zero_gradients() -> None:
    net = model(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    acc = GradAccumulator(net)
    for to_none in (True, False):
        acc.backward(net(torch.ones(2, 6)).sum(), 2)
        optimizer.zero_grad(set_to_none=to_none)
        acc.backward(net(torch.ones(3, 6)).sum(), 3)
        acc.flush()
        exact = torch.autograd.grad(net(torch.ones(1, 6)).sum(), list(net.parameters()))
        for g, e in zip(gradients(net), exact, strict=True):
            assert torch.allclose(g, e, rtol=1e-5, atol=1e-6)


def test_somebody_elses_gradient_is_refused() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    net(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient that is not"):
        acc.backward(net(torch.ones(2, 6)).sum(), 2)


def test_backwards_outside_are_left_alone() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    net(torch.ones(2, 6)).sum().backward()
    assert all(g is not None for g in gradients(net))
    acc.close()


def failing_loss(net: nn.Module) -> Tensor:
    """Its backward fails after the gradients of the last layer."""
    return net[3](Failing.apply(net[:3](torch.ones(2, 6)))).sum()


def test_exception_before_anything_was_added() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    acc.backward(net(torch.ones(2, 6)).sum(), 2)
    with pytest.raises(KeyError, match="planted"):
        acc.backward(failing_loss(net), 2)  # the head's gradients were in a bucket
    with pytest.raises(ZeroDivisionError), acc.micro_batch(count=5):
        1 / 0  # noqa: B018
    assert gradients(net) == [None] * 6
    assert acc.flush().counts == {"": 2}
    exact = torch.autograd.grad(net(torch.ones(1, 6)).sum(), list(net.parameters()))
    for g, e in zip(gradients(net), exact, strict=True):
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-6)


def test_exception_after_something_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbkern import _accumulator_collect

    monkeypatch.setattr(_accumulator_collect, "BUCKET_BYTES", 1)
    net = model(torch.float32)
    acc = GradAccumulator(net)
    with pytest.raises(KeyError, match="planted"):
        acc.backward(failing_loss(net), 2)
    for use in (acc.flush, acc.state_dict, lambda: acc.backward(net(torch.ones(2, 6)).sum(), 2)):
        with pytest.raises(RuntimeError, match=r"micro-batch 0 failed \(KeyError.*after 2 of its"):
            use()
    acc.keep_partial()
    acc.flush()
    assert net[3].weight.grad is not None
    assert net[0].weight.grad is None
    with pytest.raises(KeyError):
        acc.backward(failing_loss(net), 2)
    acc.reset()
    acc.flush()
    assert gradients(net) == [None] * 6


@pytest.mark.parametrize("mode", ["deferred", "known"])
def test_resume_has_the_same_bits(mode: str) -> None:
    problem = Problem("padding")
    nets = [model(torch.float32) for _ in range(3)]
    parts = list(problem.parts([9, 6, 4, 4]))

    def feed(acc: GradAccumulator, net: nn.Module, rows: list[slice]) -> None:
        for part in rows:
            acc.backward(*problem.loss(net, part))

    whole, first, second = (GradAccumulator(net, mode=mode) for net in nets)
    if mode == "known":
        total = problem.loss(nets[0], slice(None))[1]
        whole.begin(total)
        first.begin(total)
    feed(whole, nets[0], parts)
    feed(first, nets[1], parts[:2])
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    feed(second, nets[2], parts[2:])
    a, b = whole.flush(), second.flush()
    assert torch.equal(a.norm, b.norm)
    assert a.micro_batches == b.micro_batches == 4
    assert all(
        torch.equal(x, y) for x, y in zip(gradients(nets[0]), gradients(nets[2]), strict=True)
    )


def test_wrong_states_are_refused() -> None:
    state = GradAccumulator(model()).state_dict()
    with pytest.raises(ValueError, match=r"other parameters; only there: \['0\.bias'"):
        GradAccumulator([nn.Parameter(torch.ones(2))]).load_state_dict(state)
    with pytest.raises(ValueError, match="another accumulator"):
        GradAccumulator(model(), mode="streaming").load_state_dict(state)
    net = model()
    acc = GradAccumulator(net)
    acc.backward(net[0].weight.sum(), 1)
    with pytest.raises(ValueError, match=r"the sums of 0\.weight are .*float64.*float32 on"):
        GradAccumulator(model(torch.float32)).load_state_dict(acc.state_dict())


def test_non_finite_names_micro_batch_and_parameter() -> None:
    net = model(torch.float32)
    for measure in (True, False):
        acc = GradAccumulator(net, measure=measure)
        for k in range(3):
            with acc.micro_batch(count=1):
                grads = [torch.ones_like(p) for p in net.parameters()]
                if k == 1:
                    grads[2][3] = float("nan")
                torch.autograd.backward(list(net.parameters()), grads)
        stats = acc.flush()
        assert stats.found_inf == 1
        assert stats.non_finite() == [(1 if measure else -1, "2.weight")]
        if measure:
            norms = torch.stack(stats.micro_batch_norms())
            size = sum(p.numel() for p in net.parameters())
            assert torch.equal(norms[[0, 2]], torch.tensor([size] * 2).double().sqrt())
        acc.close()
        net.zero_grad()


def test_known_mode_checks_what_was_announced() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net, mode="known")
    with pytest.raises(RuntimeError, match=r"needs begin\(total"):
        acc.backward(net(torch.ones(2, 6)).sum())
    acc.begin(4)
    acc.backward(net(torch.ones(2, 6)).sum(), count=2)
    with pytest.raises(ValueError, match=r"announced a total of 4.*2\.0 were counted"):
        acc.flush()
    with pytest.raises(RuntimeError, match="after 1 micro-batches"):
        acc.begin(4)
    acc.reset()
    acc.begin(0)
    acc.backward(net(torch.zeros(0, 6)).sum())
    acc.flush()
    assert all((g == 0).all() for g in gradients(net))
    with pytest.raises(ValueError, match="total must name"):
        acc.begin({"ce": 1})
    with pytest.raises(RuntimeError, match="this is 'deferred'"):
        GradAccumulator(net).begin(3)


def test_sparse_gradients() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    acc = GradAccumulator(table)
    with pytest.raises(TypeError, match=r"gradient of weight has layout torch.sparse_coo"):
        acc.backward(table(torch.tensor([1, 1, 2])).sum(), 1)
    acc = GradAccumulator(table, sparse="densify")
    acc.backward(table(torch.tensor([1, 1, 2])).sum(), 1)
    acc.flush()
    assert table.weight.grad[:, 0].tolist() == [0, 2, 1] + [0] * 7


def test_deepcopy_pickle_and_the_end() -> None:
    net = model(torch.float32)
    acc = GradAccumulator(net)
    twin = copy.deepcopy(net)
    restored = pickle.loads(pickle.dumps(net))
    for other in (twin, restored):
        other(torch.ones(2, 6)).sum().backward()
        assert all(g is not None for g in gradients(other))
    with acc.micro_batch(count=1):
        twin(torch.ones(2, 6)).sum().backward()
    assert acc.flush().norm == 0
    del acc
    gc.collect()
    net(torch.ones(2, 6)).sum().backward()
    assert all(g is not None for g in gradients(net))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradAccumulator([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), TypeError,
         "complex64.*view_as_real"),
        (lambda: GradAccumulator([torch.ones(2, requires_grad=True) * 2]), ValueError, "no leaf"),
        (lambda: GradAccumulator(["w"]), TypeError, "must be a tensor, not str"),
        (lambda: GradAccumulator([{"parameters": []}]), TypeError, 'dicts with "params"'),
        (lambda: GradAccumulator(model(), mode="eager"), ValueError, "mode must be one of"),
        (lambda: GradAccumulator(model(), layout="x"), ValueError, "layout must be one of"),
        (lambda: GradAccumulator(model(), into="x"), ValueError, "into must be one of"),
        (lambda: GradAccumulator(model(), dtype=torch.bfloat16), ValueError, "one of kahan"),
        (lambda: GradAccumulator(model(), pre_scale=0), ValueError, "must be positive"),
        (lambda: GradAccumulator(model()).backward(torch.ones(2), 1), ValueError, r"0-dim.*\(2,\)"),
        (lambda: GradAccumulator(model()).backward(torch.ones(()), None), ValueError, "needs the"),
        (lambda: GradAccumulator(model()).backward(torch.ones(()), -1), ValueError, "count is -1"),
        (lambda: GradAccumulator(model()).backward(torch.ones(()), torch.ones(2)), ValueError,
         "0-dim tensor"),
    ],
)  # fmt: skip
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
