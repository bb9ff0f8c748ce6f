"""The shortest way of a loss of two tensors: what may take it, and that nothing else does."""

from __future__ import annotations

import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import mbkern
from mbkern import _C, _launch
from mbkern import _losses as mbkern_losses
from mbkern._arguments import REDUCTIONS
from mbkern.functional import _ends

pytestmark = pytest.mark.skipif(
    not _launch.has_exchange_table, reason="this torch has no exchange table"
)

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Subclass(torch.Tensor):
    pass


def plainness(first: Any, second: Any) -> int:
    """What the shortest way finds: 0: not plain; 1: plain, but of 16 bits; 2: it was taken."""
    number = mbkern_losses.find("mse_loss").number
    done = _C.plain_loss(number, first, second, True, REDUCTIONS["mean"], ())
    return 2 if isinstance(done, tuple) else done


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (2, 0, 3)])
def test_plain_tensors_are_alike(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    want = 2 if dtype in (torch.float32, torch.float64) else 1
    assert plainness(a, b) == want
    assert plainness(a, a) == want
    assert plainness(torch.nn.Parameter(a), b) == want
    assert plainness(a.t() if len(shape) == 2 else a, b.t() if len(shape) == 2 else b) == want


def _others() -> dict[str, Any]:
    with FakeTensorMode():
        fake = torch.zeros(3, 4)
    return {
        "none": None,
        "number": 1.0,
        "text": "a",
        "array": torch.zeros(3, 4).numpy(),
        "dtype": torch.zeros(3, 4, dtype=torch.float64),
        "integers": torch.zeros(3, 4, dtype=torch.int64),
        "booleans": torch.zeros(3, 4, dtype=torch.bool),
        "complex": torch.zeros(3, 4, dtype=torch.complex64),
        "transposed": torch.zeros(4, 3),
        "flat": torch.zeros(12),
        "broadcast": torch.zeros(1, 4),
        "one dimension more": torch.zeros(3, 4, 1),
        "subclass": torch.zeros(3, 4).as_subclass(Subclass),
        "fake": fake,
        "meta": torch.zeros(3, 4, device="meta"),
        "sparse": torch.zeros(3, 4).to_sparse(),
        "freed": _freed(),
    }


def _freed() -> torch.Tensor:
    t = torch.zeros(3, 4)
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("name", list(_others()))
def test_others_are_not(name: str) -> None:
    plain, other = torch.zeros(3, 4), _others()[name]
    assert not plainness(plain, other)
    assert not plainness(other, plain)
    if name in ("integers", "booleans", "complex", "subclass", "fake", "meta", "sparse", "freed"):
        assert not plainness(other, other)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_who_watches_calls_is_seen() -> None:
    x, t = torch.zeros(3, 4), torch.ones(3, 4)
    found: dict[str, int] = {}

    def ask(name: str, value: torch.Tensor = x) -> torch.Tensor:
        found[name] = plainness(x, t)
        return value.sum()

    ask("nobody")
    with torch.device("cpu"):
        ask("a default device")
    with Watching():
        ask("a function mode")
    with Watching(), torch.device("cpu"):
        ask("a function mode, and a default device")
    with FlopCounterMode(display=False):
        ask("a dispatch mode")
    torch.func.grad(lambda v: ask("a transform", v))(x)
    torch.func.vmap(lambda v: ask("many at once", v))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(lambda v: ask("tracing", v), x, check_trace=False)
    make_fx(lambda v: ask("tracing with make_fx", v))(x)
    ask("nobody any more")
    unseen = {"nobody", "a default device", "nobody any more"}
    assert found == {name: 2 if name in unseen else 0 for name in found}
    assert len(found) == 10


def test_most_calls_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with anything to look at, a call does not."""
    x, t = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    want = mbkern.functional.mse_loss(x, t).detach()
    taken: list[bool] = []

    def one_shape(*args: Any) -> Any:
        taken.append(False)
        return found(*args)

    found = _ends._one_shape
    monkeypatch.setattr(_ends, "_one_shape", one_shape)
    for reduction in ("none", "mean", "sum"):
        mbkern.functional.mse_loss(x, t, reduction=reduction)
    mbkern.nn.HuberLoss(delta=0.5)(x, t)
    mbkern.functional.l1_loss(x.bfloat16(), t.bfloat16())
    assert not taken
    assert torch.equal(mbkern.functional.mse_loss(x, t, sample_weight=torch.ones(3, 4)), want)
    mbkern.functional.mse_loss(x, t.double())
    mbkern.functional.mse_loss(x * 1, t, inplace=True)
    with FlopCounterMode(display=False):
        mbkern.functional.mse_loss(x.detach(), t)
    torch.func.grad(mbkern.functional.mse_loss)(x.detach(), t)
    assert len(taken) == 5
    with pytest.raises(ValueError, match="'all' is not a valid reduction"):
        mbkern.functional.mse_loss(x, t, reduction="all")
    with pytest.raises(NotImplementedError, match="no gradient for target"):
        mbkern.functional.soft_margin_loss(x, t.clone().requires_grad_())


def _node(loss: torch.Tensor) -> str:
    return type(loss.grad_fn).__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_plain_calls_have_a_node_of_their_own(dtype: torch.dtype) -> None:
    """And what it does not do, TensorLoss does."""
    x, t = torch.rand(3, 4, dtype=dtype, requires_grad=True), torch.rand(3, 4, dtype=dtype)
    functional = mbkern.functional
    for reduction in ("mean", "sum"):
        assert _node(functional.mse_loss(x, t, reduction=reduction)) == "PlainLossBackward"
    assert _node(functional.huber_loss(t, x, delta=0.5)) == "PlainLossBackward"
    assert _node(functional.kl_div(x, x)) == "PlainLossBackward"
    logits = functional.binary_cross_entropy_with_logits
    assert _node(logits(x, t)) == "PlainLossBackward"
    others = [
        functional.mse_loss(x, t, reduction="none"),
        functional.mse_loss(x, t, weight=torch.ones(3, 4, dtype=dtype)),
        functional.binary_cross_entropy(x, t),
        functional.mse_loss(x.half(), t.half()),
        functional.mse_loss(x, t, denominator=3.0),
        logits(x, t, pos_weight=torch.ones(4, dtype=dtype)),
    ]
    with torch.autograd.graph.save_on_cpu():
        others.append(functional.mse_loss(x, t))
    assert {_node(other) for other in others} == {"TensorLossBackward"}
    with torch.no_grad():
        assert functional.mse_loss(x, t).grad_fn is None
    assert functional.mse_loss(x.detach(), t).grad_fn is None


def _losses(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same loss by the two nodes."""
    plain = mbkern.functional.huber_loss(x, t, reduction="sum", delta=0.3)
    full = mbkern.functional.huber_loss(
        x, t, reduction="sum", delta=0.3, sample_weight=torch.ones_like(t)
    )
    assert (_node(plain), _node(full)) == ("PlainLossBackward", "TensorLossBackward")
    return plain, full


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("incoming", [1.0, 0.0, -0.5, 3e38, float("inf"), float("nan")])
def test_both_nodes_give_the_same_bits(wanted: tuple[bool, bool], incoming: float) -> None:
    x, t = (torch.randn(5, 7).requires_grad_(w) for w in wanted)
    inputs = [v for v in (x, t) if v.requires_grad]
    results = []
    for loss in _losses(x, t):
        factor = torch.tensor(incoming)
        first = torch.autograd.grad(loss, inputs, factor, retain_graph=True)
        again = torch.autograd.grad(loss, inputs, factor)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(loss, inputs, factor)
        results.append([v.detach().view(torch.int32) for v in (loss, *first, *again)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_gradient_is_the_kernels_own_memory() -> None:
    x, t = torch.randn(100, requires_grad=True), torch.randn(100)
    loss, _ = _losses(x, t)
    written = loss.grad_fn.grads[0].data_ptr()  # type: ignore[union-attr]
    loss.backward()
    assert x.grad is not None
    assert x.grad.data_ptr() == written


def test_second_derivatives_and_many_incoming_gradients() -> None:
    x, t = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    seconds, many = [], []
    for node in range(2):
        grads = torch.autograd.grad(_losses(x, t)[node], (x, t), create_graph=True)
        seconds.append(torch.autograd.grad(grads[0].square().sum(), (x, t)))
        loss, factors = _losses(x, t)[node], torch.tensor([1.0, -2.0, 0.0])
        many.append(torch.autograd.grad(loss, (x, t), factors, is_grads_batched=True))
    for pairs in (zip(*seconds, strict=True), zip(*many, strict=True)):
        assert all(torch.equal(a, b) for a, b in pairs)
    once = torch.autograd.grad(_losses(x, t)[0], (x, t))
    assert torch.equal(many[0][0], torch.stack([once[0], -2.0 * once[0], 0.0 * once[0]]))


def test_what_the_kernel_does_not_take_is_copied_for_it() -> None:
    """A negated view, and eleven dimensions that do not merge."""
    x = torch.randn(6, dtype=torch.complex64).conj().imag
    many = torch.randn((2,) * 11)
    for first in (x, many.permute(tuple(range(10, -1, -1)))):
        plain = first.resolve_neg().contiguous()
        leaf, same = (v.detach().requires_grad_() for v in (first, plain))
        t = torch.randn(first.shape)
        loss = mbkern.functional.mse_loss(leaf, t)
        want = mbkern.functional.mse_loss(same, t)
        assert (_node(loss), _node(want)) == ("TensorLossBackward", "PlainLossBackward")
        loss.backward()
        want.backward()
        assert leaf.grad is not None
        assert same.grad is not None
        assert torch.equal(loss, want)
        assert torch.equal(leaf.grad, same.grad)


def test_large_losses_get_huge_pages() -> None:
    """From TensorLoss, where a launch's time does not count any more."""
    x = torch.zeros(_launch.HUGE_PAGE_BYTES // 4, requires_grad=True)
    assert _node(mbkern.functional.mse_loss(x, x.detach())) == "TensorLossBackward"
    assert _node(mbkern.functional.mse_loss(x[1:], x.detach()[1:])) == "PlainLossBackward"


def test_a_loss_that_is_dropped_frees_its_gradient() -> None:
    """At once: nothing of it is held in a circle."""
    x, t = torch.randn(100, requires_grad=True), torch.randn(100)
    loss = mbkern.functional.mse_loss(x, t)
    kept = [weakref.ref(loss), weakref.ref(loss.grad_fn.grads[0])]  # type: ignore[union-attr]
    gc.disable()
    try:
        del loss
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_several_callers(threads: int) -> None:
    x, t = torch.randn(70_000), torch.randn(70_000)
    want = mbkern.loss_and_grad("huber_loss", x, t, delta=0.5)
    torch.set_num_threads(threads)

    def call(_: int) -> bool:
        leaf = x.clone().requires_grad_()
        loss = mbkern.functional.huber_loss(leaf, t, delta=0.5)
        loss.backward()
        assert leaf.grad is not None
        return torch.equal(loss, want[0]) and torch.equal(leaf.grad, want[1])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))
