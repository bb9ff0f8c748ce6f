"""What must not go wrong in silence: uses of an accumulator that nobody planned."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from windows import Failing

import mbkern
from mbkern import GradAccumulator
from mbkern import functional as F

pytestmark = pytest.mark.cpu


def ones(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=dtype))


def gradient(parameter: Tensor) -> list[float]:
    assert parameter.grad is not None
    found: list[float] = parameter.grad.tolist()
    return found


def test_parameters_of_one_name() -> None:
    a, b = (nn.Linear(2, 1, bias=False) for _ in "ab")
    acc = GradAccumulator(a, measure=True)
    acc.add(b)
    x = torch.ones(1, 2)
    acc.backward(a(x).sum() + 3 * b(x).sum(), 1)
    acc.load_state_dict(acc.state_dict())
    stats = acc.flush()
    assert gradient(a.weight) == [[1, 1]]
    assert gradient(b.weight) == [[3, 3]]
    assert list(stats.squared_norms) == ["weight", "weight (2)"]


def test_pre_scale() -> None:
    p = ones()
    acc = GradAccumulator([p], pre_scale=2**-6, measure=True)
    with pytest.raises(RuntimeError, match="use backward"), acc.micro_batch(count=1):
        pass
    with pytest.raises(RuntimeError, match="buffer"):
        acc.buffer(p)
    acc.backward(3 * p.sum(), 1)
    stats = acc.flush()
    assert gradient(p) == [3, 3]
    assert stats.micro_batch_norms()[0].item() == pytest.approx(18**0.5)


def test_noise_scale_with_pre_scale() -> None:
    found = []
    for pre_scale in (1.0, 2**-8):
        torch.manual_seed(0)
        p, noise = ones(), mbkern.NoiseScale()
        acc = GradAccumulator([p], pre_scale=pre_scale, measure=True)
        for _ in range(5):
            for _ in range(3):
                acc.backward((p * torch.randn(2)).sum() + p.sum(), 1)
            acc.flush().update(noise)
        found.append(float(noise.noise_scale))
    assert found[0] == pytest.approx(found[1])


def test_a_kernel_adds_and_then_the_block_fails() -> None:
    p = ones()
    acc = GradAccumulator([p])

    def fail(add: bool) -> None:
        with acc.micro_batch(count=2):
            buffer = acc.buffer(p)
            if add:
                mbkern.accumulate_(buffer, torch.ones(2))
            raise KeyError

    with pytest.raises(KeyError):
        fail(add=True)
    with pytest.raises(RuntimeError, match="some of its gradients had been added"):
        acc.flush()
    acc.reset()
    with pytest.raises(KeyError):
        fail(add=False)
    acc.backward(p.sum(), 1)
    acc.flush()
    assert gradient(p) == [1, 1]


def test_keep_partial_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbkern._accumulator_collect.BUCKET_BYTES", 1)
    p, q = ones(), ones()
    acc = GradAccumulator([p, q], measure=True)
    with pytest.raises(KeyError, match="planted"):
        acc.backward((q + Failing.apply(p) + q).sum() * 2, 4)  # type: ignore[no-untyped-call]
    acc.keep_partial()
    stats = acc.flush()
    assert stats.counts == {"": 4}
    assert gradient(q) == [1, 1]
    with pytest.raises(ValueError, match="noise scale needs"):
        stats.update(mbkern.NoiseScale())


@pytest.mark.parametrize("what", ["flush", "reset", "state_dict", "keep_partial"])
def test_inside_a_micro_batch(what: str) -> None:
    p = ones()
    acc = GradAccumulator([p])
    acc.backward(p.sum(), 2)
    with pytest.raises(RuntimeError, match="inside a micro-batch"), acc.micro_batch(count=2):
        getattr(acc, what)()
    state = acc.state_dict()
    with pytest.raises(RuntimeError, match="inside a micro-batch"), acc.micro_batch(count=2):
        acc.load_state_dict(state)
    acc.backward(p.sum(), 2)
    acc.flush()
    assert gradient(p) == [0.5, 0.5]


@pytest.mark.parametrize(("size", "strides"), [((2000,), (0,)), ((1000, 2), (1, 1))])
def test_flush_in_place_of_shared_elements(size: tuple[int], strides: tuple[int]) -> None:
    b = torch.ones(1001).as_strided(size, strides)
    with pytest.raises(ValueError, match="share memory"):
        mbkern.flush_(b, b, denominator=2.0)
    assert (b == 1).all()


def test_flush_in_place_with_other_strides_of_one() -> None:
    b = torch.ones(1, 6)
    mbkern.flush_(b.as_strided((1, 6), (99, 1)), b, denominator=2.0)
    assert (b == 0.5).all()


def test_the_list_changes_meanwhile() -> None:
    """As torch's own calls over lists do, the call goes on with what it was given."""
    n = 3_000_000
    buffers, grads = ([make(n) for _ in range(4)] for make in (torch.zeros, torch.ones))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kept = list(buffers)

    def clear() -> None:
        while kept[0][0] == 0:  # the call has not begun
            time.sleep(1e-4)
        grads.clear()
        buffers.clear()

    other = threading.Thread(target=clear)
    other.start()
    mbkern.accumulate_(buffers, grads)
    other.join()
    torch.set_num_threads(threads)
    assert all((b == 1).all() for b in kept)


def test_copies() -> None:
    net = nn.Linear(2, 1)
    acc = GradAccumulator(net)
    x = torch.ones(1, 2)
    acc.backward(net(x).sum(), 1)
    other_net, other = copy.deepcopy((net, acc))
    other.backward(other_net(x).sum(), 1)
    assert float(other.flush().norm) == pytest.approx(3**0.5)
    assert gradient(other_net.weight) == [[1, 1]]
    assert net.weight.grad is None
    acc.flush()
    assert gradient(net.weight) == [[1, 1]]
    with pytest.raises(TypeError, match="save state_dict"):
        pickle.dumps(acc)


@pytest.mark.parametrize("attribute", [True, False])
def test_a_gradient_that_goes_elsewhere(attribute: bool) -> None:
    w = nn.Parameter(torch.randn(5, 3))
    w.main_grad = torch.zeros(5, 3)  # type: ignore[attr-defined]
    if attribute:
        w.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    acc = GradAccumulator([w])
    loss = F.linear_cross_entropy(
        torch.randn(4, 3), w, torch.tensor([0, 1, 2, 3]), accumulate_into="main_grad"
    )
    with pytest.raises(RuntimeError, match="GradAccumulator"):
        acc.backward(loss, 4)
    assert w.grad is None


def test_a_backward_outside() -> None:
    p = ones()
    acc = GradAccumulator([p])
    optimizer = torch.optim.SGD([p], lr=0.0)
    acc.backward(p.sum(), 1)
    acc.flush()
    optimizer.zero_grad(set_to_none=False)
    (5 * p).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="added to the one that flush"):
        acc.backward(p.sum(), 1)
    optimizer.zero_grad()
    acc.backward(p.sum(), 1)
    acc.flush()
    assert gradient(p) == [1, 1]


def test_two_accumulators_at_once() -> None:
    p = ones()
    a, b = GradAccumulator([p]), GradAccumulator([p])
    with (
        pytest.raises(RuntimeError, match="two accumulators"),
        a.micro_batch(count=1),
        b.micro_batch(count=1),
    ):
        p.sum().backward()  # type: ignore[no-untyped-call]


def test_two_threads() -> None:
    p = ones()
    acc = GradAccumulator([p])
    done: list[int] = []

    def work() -> None:
        for _ in range(50):
            with contextlib.suppress(RuntimeError):  # refused, and nothing was added
                acc.backward(p.sum(), 1)
                done.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = acc.flush()
    assert stats.counts == {"": len(done)}
    # How many were refused is chance; 47 times 1 / 47 is not 1 in fp32.
    alone = ones()
    one_by_one = GradAccumulator([alone])
    for _ in done:
        one_by_one.backward(alone.sum(), 1)
    one_by_one.flush()
    assert gradient(p) == gradient(alone)
    assert gradient(p) == pytest.approx([1, 1], rel=2**-23)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_norm": -1.0}, {"max_norm": float("nan")}, {"l1": -1.0}, {"l2": float("nan")},
        {"pre_scale": float("inf")}, {"pre_scale": 0.0}, {"denominators": "ce"},
        {"denominators": ("a", "a")},
    ],
)  # fmt: skip
def test_options_are_checked_at_once(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GradAccumulator([ones()], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="l2 is -1"):
        GradAccumulator([{"params": [ones()], "l2": -1}])
    acc = GradAccumulator([ones()], l1=np.float32(0.5))
    with pytest.raises(ValueError, match="max_norm"):
        acc.max_norm = -2.0


def test_a_scaler_and_no_micro_batch() -> None:
    p = ones()
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), torch.amp.GradScaler("cpu")
    acc = GradAccumulator([p])
    acc.flush(scaler, optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [1, 1]


def test_a_scaler_and_several_optimizers() -> None:
    p, q = ones(), ones()
    first, second = torch.optim.SGD([p], lr=1.0), torch.optim.SGD([q], lr=1.0)
    scaler, acc = torch.amp.GradScaler("cpu"), GradAccumulator([p, q])
    acc.backward(scaler.scale((p + q).sum()), 1)
    with pytest.raises(ValueError, match="is of none of the optimizers"):
        acc.flush(scaler, first)
    acc.flush(scaler, [first, second])
    for optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == q.tolist() == [0, 0]

    both = torch.optim.SGD([p, q], lr=1.0)
    only, p.grad = GradAccumulator([p]), None
    q.grad = torch.ones(2)
    only.backward(scaler.scale(p.sum()), 1)
    with pytest.raises(ValueError, match="not this accumulator's"):
        only.flush(scaler, both)


def test_two_gradients_in_one_micro_batch() -> None:
    p = ones()
    acc = GradAccumulator([p], measure=True)
    with acc.micro_batch(count=1):
        p.sum().backward()  # type: ignore[no-untyped-call]
        (-p).sum().backward()  # type: ignore[no-untyped-call]
    stats = acc.flush()
    assert gradient(p) == [0, 0]
    with pytest.raises(RuntimeError, match="two gradients in one micro-batch"):
        stats.micro_batch_norms()
    with pytest.raises(ValueError, match="no two of one parameter"):
        stats.update(mbkern.NoiseScale())


def test_measurements_survive_a_resume() -> None:
    found = []
    for resume in (False, True):
        torch.manual_seed(1)
        p, noise = ones(), mbkern.NoiseScale()
        acc = GradAccumulator([p], measure=True)
        acc.backward((p * torch.randn(2)).sum(), 2)
        if resume:
            state = acc.state_dict()
            acc = GradAccumulator([p], measure=True)
            acc.load_state_dict(state)
        acc.backward((p * torch.randn(2)).sum(), 1)
        acc.flush().update(noise)
        found.append(float(noise.noise_scale))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="not the state"):
        acc.load_state_dict({})


def test_totals_are_as_they_were() -> None:
    p, total = ones(), torch.tensor(2.0)
    acc = GradAccumulator([p], mode="known")
    acc.begin(total)
    acc.backward(p.sum())
    total.fill_(8)
    state = acc.state_dict()
    acc.backward(p.sum())
    acc.flush()
    assert gradient(p) == [1, 1]
    assert float(state["totals"][""]) == 2


def test_known_totals_that_are_right() -> None:
    p = ones()
    acc = GradAccumulator([p], mode="known")
    acc.begin(0.3)
    acc.backward(p.sum(), 0.1)
    acc.backward(p.sum(), 0.2)
    acc.flush()
    acc.begin(4)
    acc.backward(p.sum(), 2)
    acc.backward(p.sum())
    acc.flush()
    assert gradient(p) == [0.5, 0.5]


def test_overflow_of_a_narrower_type() -> None:
    grad = torch.empty(2, dtype=torch.float16)
    assert mbkern.flush_(grad, torch.tensor([1e5, 0.0])).found_inf == 1
    assert mbkern.flush_(grad, torch.tensor([1e4, 0.0])).found_inf == 0
    narrow = torch.empty(1)
    assert mbkern.flush_(narrow, torch.tensor([1e300], dtype=torch.float64)).found_inf == 1


def test_a_gradient_that_no_hook_saw() -> None:
    p, q = ones(), ones()
    q.requires_grad_(False)
    acc = GradAccumulator([p, q])

    def work() -> None:
        with acc.micro_batch(count=1):
            q.requires_grad_(True)
            (p + q).sum().backward()  # type: ignore[no-untyped-call]

    with pytest.raises(RuntimeError, match="no hook saw"):
        work()
    acc.reset()
    acc.backward((p + q).sum(), 1)
    acc.flush()
    assert gradient(q) == [1, 1]


@pytest.mark.parametrize(
    "count", [-1, float("inf"), float("nan"), "4", torch.tensor(-2), torch.tensor(1j), np.ones(2)]
)
def test_counts(count: object) -> None:
    p = ones()
    acc, known = GradAccumulator([p]), GradAccumulator([p], mode="known")
    with pytest.raises(ValueError, match="count"):
        acc.backward(p.sum(), count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total"):
        known.begin(count)  # type: ignore[arg-type]
    assert p.grad is None


def test_a_count_with_a_graph() -> None:
    p, noise = ones(), mbkern.NoiseScale()
    acc = GradAccumulator([p], measure=True)
    weight = torch.tensor(2.0, requires_grad=True)
    for _ in range(2):
        acc.backward((p * torch.randn(2)).sum(), weight * 2)
    acc.flush().update(noise)
    copy.deepcopy(noise)


def test_windows_without_a_micro_batch() -> None:
    acc = GradAccumulator([ones()])
    stats = acc.flush()
    assert stats.non_finite() == []
    stats.update(mbkern.NoiseScale())


def test_hooks_of_the_dead_go() -> None:
    p = ones()
    for _ in range(20):
        GradAccumulator([p])
    gc.collect()
    p.sum().backward()  # type: ignore[no-untyped-call]
    assert not p._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_the_gradient_is_not_kept_alive() -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    acc = GradAccumulator([p])
    acc.backward(p.sum(), 1)
    acc.flush()
    assert p.grad is not None
    storage = torch.multiprocessing.reductions.StorageWeakRef(p.grad.untyped_storage())
    p.grad = None
    assert storage.expired()
    acc.backward(p.sum(), 1)


def test_arrays() -> None:
    class Holder:
        def __init__(self) -> None:
            self.array = np.zeros(3, dtype=np.float32)
            self.__array_interface__ = self.array.__array_interface__

    holder, grad = Holder(), np.ones(3, dtype=np.float32)
    grad.flags.writeable = False
    mbkern.accumulate_([holder], [grad])
    assert holder.array.tolist() == [1, 1, 1]


def test_what_is_no_parameter() -> None:
    class Other(torch.Tensor):
        pass

    for wrong, text in (
        (torch.ones(2).as_subclass(Other), "plain"), (torch.ones(2, device="meta"), "memory"),
        (torch.ones(2).to_sparse(), "dense"), (torch.ones((1,) * 9), "9 dimensions"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=text):
            GradAccumulator([wrong.requires_grad_()])
