"""torch's functions and modules, run here where that is exactly the same, else on torch."""

from __future__ import annotations

import functools
import inspect
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy as imported_cross_entropy
from torch.nn.functional import mse_loss as imported_mse_loss
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import mbkern
from mbkern import _patched
from mbkern._patched import PatchReport, patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread", "left_as_it_was")

ORIGINALS = {"cross_entropy": imported_cross_entropy, "mse_loss": imported_mse_loss}
OURS = {name: getattr(mbkern.functional, name) for name in ORIGINALS}
OPS = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if op.name.startswith("nn.functional.") and not op.variant_test_name
}
every_loss = pytest.mark.parametrize("name", ORIGINALS)
every_way = pytest.mark.parametrize("mode", [False, True], ids=["wrapper", "mode"])

torch.manual_seed(0)
X = torch.randn(64, 37)
Y = torch.randn(64, 37)
T = torch.randint(37, (64,))
W = torch.rand(37) + 0.1
ARGUMENTS = {"cross_entropy": (X, T), "mse_loss": (X, Y)}


@pytest.fixture
def left_as_it_was() -> Iterator[None]:
    yield
    for name, original in ORIGINALS.items():
        assert getattr(F, name) is original
    assert not _patched._thread.on
    assert not _patched._Process.on
    assert _patched._Process.users == 0
    assert _patched._thread.reports == _patched._thread.modes == ()


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A result, or the type and text of an error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b) and type(a) is type(b)


def by_torch(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The loss by torch, also inside a mode."""
    with torch._C.DisableTorchFunction():
        return ORIGINALS[name](*args, **kwargs)


def run_by(function: Callable[..., Tensor], *args: Tensor) -> str:
    """Which library's node a loss is the output of."""
    leaf = args[0].detach().clone().requires_grad_()
    node = type(function(leaf, *args[1:]).grad_fn).__name__
    return "mbkern" if node.lstrip("_") in ("RowLossBackward", "PointwiseLossBackward") else "torch"


# ---- where it is on ------------------------------------------------------------------------------


def test_every_common_loss_is_taken_in() -> None:
    functions = dict(vars(F))
    with patched():
        replaced = {name for name, value in vars(F).items() if value is not functions[name]}
    assert replaced == {loss.name for loss in mbkern.losses() if hasattr(F, loss.name)}
    assert replaced >= ORIGINALS.keys()


@every_way
@every_loss
def test_functions_and_modules(name: str, mode: bool) -> None:
    """Ours inside, bit by bit, with gradients; torch's before and after."""
    args = ARGUMENTS[name]
    module = {"cross_entropy": torch.nn.CrossEntropyLoss, "mse_loss": torch.nn.MSELoss}[name]()

    def live(*args: Tensor) -> Tensor:
        result: Tensor = getattr(F, name)(*args)
        return result

    assert run_by(live, *args) == run_by(module, *args) == "torch"
    with patched(mode=mode) as report:
        assert report is None
        for function in (live, module):
            assert run_by(function, *args) == "mbkern"
            grads = []
            for call in (function, OURS[name]):
                leaf = args[0].clone().requires_grad_()
                loss = call(leaf, *args[1:])
                loss.backward()
                grads.append((loss.detach(), leaf.grad))
            assert all(map(torch.equal, *grads))
    assert run_by(live, *args) == run_by(module, *args) == "torch"


@every_loss
def test_mode_catches_names_imported_beforehand(name: str) -> None:
    args = ARGUMENTS[name]
    with patched():
        assert run_by(ORIGINALS[name], *args) == "torch"
    with patched(mode=True):
        assert getattr(F, name) is ORIGINALS[name]
        assert run_by(ORIGINALS[name], *args) == "mbkern"
        assert torch.equal(torch.neg(X), -X)
    assert run_by(ORIGINALS[name], *args) == "torch"


def in_a_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(outcome(function)))
    thread.start()
    thread.join()
    return results[0]


@every_way
def test_only_this_thread(mode: bool) -> None:
    def probe() -> str:
        return run_by(lambda *a: F.cross_entropy(*a), X, T)

    with patched(mode=mode):
        assert in_a_thread(probe) == "torch"
        assert probe() == "mbkern"

    def inside() -> tuple[str, str]:
        with patched(mode=mode):
            return probe(), in_a_thread(probe)

    with patched():
        assert in_a_thread(inside) == ("mbkern", "torch")
        assert probe() == "mbkern"
    assert probe() == "torch"


def test_other_threads_overlap() -> None:
    """The wrappers stay until the last of many threads has left, and calls are right meanwhile."""
    wrong: list[Any] = []

    def work(inside: bool) -> None:
        for _ in range(100):
            if inside:
                with patched():
                    found = run_by(lambda *a: F.mse_loss(*a), X, Y)
            else:
                found = run_by(lambda *a: F.mse_loss(*a), X, Y)
            if found != ("mbkern" if inside else "torch"):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(k % 2 == 0,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_patch_is_counted() -> None:
    def probe() -> str:
        return run_by(lambda *a: F.cross_entropy(*a), X, T)

    with pytest.raises(RuntimeError, match=r"^mbkern: unpatch\(\) without a patch\(\)"):
        unpatch()
    patch()
    try:
        patch()
        assert probe() == in_a_thread(probe) == "mbkern"
        unpatch()
        with patched():
            assert probe() == "mbkern"
        assert probe() == in_a_thread(probe) == "mbkern"
        with patched():
            unpatch()
            try:
                assert probe() == "mbkern"
                assert in_a_thread(probe) == "torch"
                with pytest.raises(RuntimeError, match="unpatch"):
                    unpatch()
            finally:
                patch()
    finally:
        unpatch()
    assert probe() == "torch"


@pytest.mark.cpu
@every_way
def test_nested_and_left_by_exceptions(mode: bool) -> None:
    block = patched(mode=mode)

    def probe() -> str:
        return run_by(lambda *a: F.cross_entropy(*a), X, T)

    def fail() -> None:
        with block, block:
            assert probe() == "mbkern"
            raise ZeroDivisionError

    with block:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert probe() == "mbkern"
    assert probe() == "torch"
    with patched(mode=not mode):
        with block, pytest.raises(IndexError):
            F.cross_entropy(X, T + 37)
        assert probe() == "mbkern"


@every_way
def test_left_where_it_was_not_entered(mode: bool) -> None:
    block = patched(mode=mode)
    with block:
        kind, text = in_a_thread(lambda: block.__exit__(None, None, None))
        assert kind is RuntimeError
        assert "a thread that had not entered it" in text


@every_way
def test_decorator(mode: bool) -> None:
    @patched(mode=mode)
    def probe(depth: int) -> str:
        return probe(depth - 1) if depth else run_by(lambda *a: F.cross_entropy(*a), X, T)

    assert probe(0) == probe(2) == "mbkern"
    assert run_by(lambda *a: F.cross_entropy(*a), X, T) == "torch"


def test_somebody_elses_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any) -> str:
        return "theirs"

    with monkeypatch.context() as m:
        m.setattr(F, "mse_loss", theirs)
        with patched():
            assert F.mse_loss(X, Y) == "theirs"
            assert run_by(lambda *a: F.cross_entropy(*a), X, T) == "mbkern"
        assert F.mse_loss is theirs
    with patched():
        wrapper = F.mse_loss
        F.mse_loss = theirs
    assert F.mse_loss is theirs
    F.mse_loss = imported_mse_loss
    assert run_by(wrapper, X, Y) == "torch"


# ---- what is passed on ---------------------------------------------------------------------------


class Subclass(Tensor):
    """A tensor with its own type and no overrides."""


def requires_grad(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


LOGITS = X[:, :5].contiguous()
LABELS = T % 5
IMAGE = torch.randn(2, 3, 4, 5)

PASSED_ON: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("cross_entropy", (X, T), {"weight": requires_grad(W)}, "weight requires grad"),
    ("cross_entropy", (X, T), {"weight": W.double()}, "weight is float64, input float32"),
    ("cross_entropy", (X, T), {"weight": W[1:]}, "weight's shape"),
    ("cross_entropy", (X, T), {"weight": [1.0] * 37}, "weight"),
    ("cross_entropy", (X.to(torch.complex64), T), {}, "input is complex64"),
    ("cross_entropy", (X > 0, T), {}, "input is bool"),
    ("cross_entropy", (X, T.int()), {}, "target is int32"),
    ("cross_entropy", (X, T.byte()), {}, "target is uint8"),
    ("cross_entropy", (X, T > 0), {}, "target is bool"),
    ("cross_entropy", (X, T[1:]), {}, "target's shape"),
    ("cross_entropy", (X, T[:, None]), {}, "target's shape"),
    ("cross_entropy", (X[0, 0], T[0]), {}, "input has no class dimension"),
    ("cross_entropy", (X[:, :0], T), {}, "no classes"),
    ("cross_entropy", (X, Y.softmax(1).double()), {}, "target is float64, input float32"),
    (
        "cross_entropy",
        (X, Y.softmax(1), None, None, 1),
        {},
        "ignore_index with class probabilities",
    ),
    ("cross_entropy", (X.as_subclass(Subclass), T), {}, "input is a Subclass"),
    ("cross_entropy", (X.to("meta"), T.to("meta")), {}, "input is on meta"),
    ("cross_entropy", (X.to_sparse(), T), {}, "input is not strided"),
    ("cross_entropy", ([1.0], T), {}, "input is a list"),
    ("cross_entropy", (X, T), {"reduction": "batchmean"}, "reduction"),
    ("cross_entropy", (X, T), {"reduction": None}, "reduction"),
    ("cross_entropy", (X, T), {"size_average": True}, "size_average"),
    ("cross_entropy", (X, T), {"reduce": False}, "reduce"),
    ("cross_entropy", (X, T), {"label_smoothing": 1.5}, "label_smoothing"),
    ("cross_entropy", (X, T), {"label_smoothing": "0"}, "label_smoothing"),
    ("cross_entropy", (X, T), {"ignore_index": 1.0}, "ignore_index"),
    ("cross_entropy", (X, T), {"ignore_index": 2**63}, "ignore_index"),
    ("cross_entropy", (X, T), {"sample_weight": T}, "no option sample_weight"),
    ("cross_entropy", (X,), {}, "arguments of no loss"),
    ("cross_entropy", (X, T), {"input": X}, "no option input"),
    ("cross_entropy", (X, T, None, None, 1), {"ignore_index": 1}, "arguments of no loss"),
    ("cross_entropy", (X, T, *[None] * 9), {}, "arguments of no loss"),
    ("cross_entropy", (X, T + 37), {}, "refused by mbkern"),
    ("cross_entropy", (X, T - 1), {}, "refused by mbkern"),
    ("mse_loss", (X, Y[0]), {}, "input and target differ in shape"),
    ("mse_loss", (X, Y[1:]), {}, "input and target differ in shape"),
    ("mse_loss", (X, Y.double()), {}, "target is float64, input float32"),
    ("mse_loss", (X.to(torch.complex64), Y), {}, "input is complex64"),
    ("mse_loss", (T, T), {}, "input is int64"),
    ("mse_loss", (X, T[:, None].expand(64, 37)), {}, "target is int64, input float32"),
    ("mse_loss", (X, Y), {"weight": requires_grad(X)}, "weight requires grad"),
    ("mse_loss", (X, Y), {"weight": X[0]}, "weight's shape"),
    ("mse_loss", (X, Y), {"weight": X.half()}, "weight is float16, input float32"),
    ("mse_loss", (X, Y.as_subclass(Subclass)), {}, "target is a Subclass"),
    ("mse_loss", (X.to("meta"), Y.to("meta")), {}, "input is on meta"),
]


@pytest.mark.cpu
@every_way
@pytest.mark.parametrize(
    ("name", "args", "kwargs", "reason"),
    PASSED_ON,
    ids=[f"{name}: {reason}" for name, _, _, reason in PASSED_ON],
)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:size_average and reduce")
def test_passed_on(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str, mode: bool
) -> None:
    """Torch's very result, or its very error, and the reason is counted."""
    entry = next(entry for entry, _ in _patched._table() if entry.name == name)
    want = outcome(ORIGINALS[name], *args, **kwargs)
    with patched(mode=mode, report=True) as report:
        got = outcome(getattr(F, name), *args, **kwargs)
    if isinstance(want, Tensor) and want.is_meta:
        assert got.is_meta
        assert got.shape == want.shape
    else:
        assert same(got, want), f"{got} is not {want}"
    if mode and (len(args) < 2 or "argument" in reason or "no option" in reason):
        return  # torch's own signature refuses these before a mode is asked
    assert report.passed_on == {(name, reason): 1} or mode
    assert not report.taken
    if reason != "refused by mbkern":
        assert _patched.refusal(entry, args, kwargs) == reason


TAKEN: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("cross_entropy", (X, T), {}),
    ("cross_entropy", (X, T, W), {}),
    ("cross_entropy", (X, T, W, None, 3, None, "sum", 0.1), {}),
    ("cross_entropy", (), {"target": T, "input": X}),
    ("cross_entropy", (X,), {"target": T, "label_smoothing": 1, "reduction": "none"}),
    ("cross_entropy", (X[0], T[0]), {}),
    ("cross_entropy", (X, Y.softmax(1)), {"weight": W}),
    ("cross_entropy", (IMAGE, torch.randint(3, (2, 4, 5))), {"ignore_index": 1}),
    ("cross_entropy", (X.t().contiguous().t(), T), {}),
    ("cross_entropy", (X.bfloat16(), T), {"weight": W.bfloat16()}),
    ("cross_entropy", (X.half(), T), {"reduction": "none"}),
    ("cross_entropy", (X.double(), T), {"weight": W.double()}),
    ("cross_entropy", (torch.nn.Parameter(X), T), {}),
    ("mse_loss", (X, Y), {}),
    ("mse_loss", (X, Y, None, None, "sum", X * X), {}),
    ("mse_loss", (X[0, 0], Y[0, 0]), {"reduction": "none"}),
    ("mse_loss", (X.bfloat16(), Y.bfloat16()), {}),
]


@every_way
def test_taken(mode: bool) -> None:
    """Our bits, counted, close to torch."""
    for count, (name, args, kwargs) in enumerate(TAKEN, 1):
        with patched(mode=mode, report=True) as report:
            got = getattr(F, name)(*args, **kwargs)
        assert report.taken == {name: 1}, (count, report.passed_on)
        assert not report.passed_on
        assert torch.equal(got, OURS[name](*args, **kwargs)), count
        want = ORIGINALS[name](*args, **kwargs)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_autocast() -> None:
    """Weights that autocast converts are taken; where it leaves a product alone, torch is asked."""
    x, y = X.bfloat16(), Y.bfloat16()
    with patched(report=True) as report, torch.autocast("cpu"):
        for args, kwargs in (((x, T), {}), ((x, T), {"weight": W}), ((x, Y.softmax(1)), {})):
            got = F.cross_entropy(*args, **kwargs)
            assert got.dtype is torch.float32
            torch.testing.assert_close(got, imported_cross_entropy(*args, **kwargs))
        assert F.mse_loss(x, Y).dtype is torch.float32
        assert F.mse_loss(x, y, weight=x).dtype is imported_mse_loss(x, y, weight=x).dtype
        with pytest.raises(RuntimeError):
            F.cross_entropy(x, T, W.double())
    assert report.taken == {"cross_entropy": 3, "mse_loss": 1}
    assert report.passed_on == {
        ("mse_loss", "weight under autocast"): 1,
        ("cross_entropy", "weight is float64, input bfloat16"): 1,
    }


def test_weights_do_not_lose_derivatives() -> None:
    """Also where the weight does not say that it is differentiated."""

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        def total(w: Tensor) -> Tensor:
            one = functools.partial(function, X, T, reduction="sum")
            return torch.func.vmap(lambda v: one(weight=v))(w).sum()

        result: Tensor = torch.func.grad(total)(torch.stack([W, W]))
        return result

    want = gradient(imported_cross_entropy)
    assert want.abs().max() > 0
    with patched(report=True) as report:
        assert torch.equal(gradient(lambda *a, **k: F.cross_entropy(*a, **k)), want)
    assert report.passed_on == {("cross_entropy", "weight under a transform"): 1}


def test_what_modes_and_subclasses_are_handed() -> None:
    """torch's function, by which they know it, not the wrapper."""
    seen: list[Any] = []

    class Override(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return "overridden"

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with patched():
        assert F.cross_entropy(X.as_subclass(Override), T) == "overridden"
        assert in_a_thread(lambda: F.mse_loss(X.as_subclass(Override), Y)) == "overridden"
        assert seen == [imported_cross_entropy, imported_mse_loss]
        seen.clear()
        with Watch():
            F.mse_loss(X, Y.double())
        assert imported_mse_loss in seen
        assert F.mse_loss not in seen


# ---- reports -------------------------------------------------------------------------------------


def test_report() -> None:
    with patched(report=True) as outer:
        F.cross_entropy(X, T)
        with patched(mode=True, report=True) as inner:
            F.cross_entropy(X, T)
            imported_mse_loss(X, Y)
            with patched():
                F.cross_entropy(X, T.byte())
        F.mse_loss(X, Y, reduction="sum")
    F.mse_loss(X, Y)
    assert isinstance(outer, PatchReport)
    assert isinstance(inner, PatchReport)
    assert inner.taken == {"cross_entropy": 1, "mse_loss": 1}
    assert outer.taken == {"cross_entropy": 2, "mse_loss": 2}
    assert inner.passed_on == outer.passed_on == {("cross_entropy", "target is uint8"): 1}
    assert str(outer).splitlines() == [
        "loss           calls  computed by",
        "cross_entropy      2  mbkern",
        "mse_loss           2  mbkern",
        "cross_entropy      1  torch: target is uint8",
    ]
    assert str(PatchReport()) == "loss  calls  computed by"


@every_way
def test_no_recursion(mode: bool) -> None:
    """One call is one call, also where formulas of torch operations stand in for the kernels."""
    with patched(mode=mode, report=True) as report:
        for name, (x, y) in ARGUMENTS.items():
            function = getattr(F, name)
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(function(leaf, y), leaf, create_graph=True)
            grad.square().sum().backward()
            torch.func.jvp(functools.partial(function, target=y), (x,), (x,))
    assert report.taken == {"cross_entropy": 2, "mse_loss": 2}
    assert not report.passed_on


# ---- compilers and transforms --------------------------------------------------------------------


def operators(function: Callable[..., Tensor], *args: Tensor) -> list[str]:
    """Names of what a function calls when compiled without graph breaks."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for module in graph.modules():
            names.extend(str(n.target) for n in getattr(module, "graph", graph).nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        leaf = args[0].clone().requires_grad_()
        loss = compiled(leaf, *args[1:])
        loss.backward()
    plain = args[0].clone().requires_grad_()
    want = function(plain, *args[1:])
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(leaf.grad, plain.grad)
    return names


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@every_way
@every_loss
def test_compiled(name: str, mode: bool) -> None:
    module = {
        "cross_entropy": torch.nn.CrossEntropyLoss(W, label_smoothing=0.1, ignore_index=3),
        "mse_loss": torch.nn.MSELoss(reduction="sum"),
    }[name]

    def function(x: Tensor, y: Tensor) -> Tensor:
        return getattr(F, name)(x * 2, y) + module(x, y)

    with patched(mode=mode):
        names = operators(function, *ARGUMENTS[name])
    assert len({n for n in names if n.startswith("mbkern.")}) == 2, names  # loss and backward
    assert not any(n.endswith(name) for n in names)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_follows_the_switch() -> None:
    """The switch is guarded: compiled again where it differs, and not more often."""
    graphs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append("mbkern" in graph.print_readable(print_output=False))
        return graph.forward

    @functools.partial(torch.compile, backend=backend, fullgraph=True)
    def function(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t)

    with patched():
        function(X, T)
        with patched(report=True) as report:
            function(X, T)
    assert graphs == [True]
    assert not report.taken
    function(X, T)
    assert graphs == [True, False]
    with patched():
        function(X, T)
    function(X, T)
    assert graphs == [True, False]


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_calls_that_are_passed_on() -> None:
    with patched():
        for function in (
            lambda x, y: F.mse_loss(x, y, weight=x * x),
            lambda x, y: F.mse_loss(x, y.double()),
            lambda x, y: torch.nn.CrossEntropyLoss()(x, T),
            lambda x, y: (torch.func.grad(F.mse_loss)(x, y) * x).sum(),
            lambda x, y: (torch.func.grad(lambda z: F.cross_entropy(z, T))(x) * x).sum(),
        ):
            names = operators(function, X, Y)
            assert not any("mbkern" in n for n in names), names


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_transforms_and_tracers() -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t)

    want = torch.func.grad(OURS["cross_entropy"])(X, T)
    with patched(report=True) as report:
        assert torch.equal(torch.func.grad(function)(X, T), want)
        assert "mbkern.row_loss" in make_fx(function)(X, T).code
        with FakeTensorMode():
            assert function(torch.empty(3, 4), torch.zeros(3, dtype=torch.int64)).shape == ()
        assert not report.passed_on
        traced = torch.jit.trace(function, (X, T), check_trace=False)
    assert report.passed_on == {("cross_entropy", "torch.jit.trace"): 1}
    torch.testing.assert_close(traced(Y, T), imported_cross_entropy(Y, T))


class Scripted(torch.nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, t) + F.mse_loss(x, y)


class ScriptedInside(torch.nn.Module):  # of its own: torch.jit compiles a class once
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, t) + F.mse_loss(x, y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_pickle_and_signature() -> None:
    """What reads the functions instead of calling them finds torch's."""
    want = Scripted()(X, T, Y)
    before = torch.jit.script(Scripted())
    signature = inspect.signature(F.cross_entropy)
    with patched(report=True) as report:
        inside = torch.jit.script(ScriptedInside())
        assert torch.equal(before(X, T, Y), want)
        assert torch.equal(inside(X, T, Y), want)
        assert inspect.signature(F.cross_entropy) == signature
        assert F.cross_entropy.__wrapped__ is imported_cross_entropy
        assert F.cross_entropy.__doc__ == imported_cross_entropy.__doc__
        module, function = pickle.dumps(torch.nn.CrossEntropyLoss()), pickle.dumps(F.mse_loss)
        assert pickle.loads(function) is F.mse_loss
    assert torch.equal(inside(X, T, Y), want)
    assert not report.taken
    assert pickle.loads(function) is F.mse_loss
    assert torch.equal(pickle.loads(module)(X, T), imported_cross_entropy(X, T))
    assert b"mbkern" not in module + function


# ---- torch's own samples -------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_loss
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:size_average and reduce")
def test_torch_samples(name: str, dtype: torch.dtype, mode: bool) -> None:
    torch.manual_seed(0)
    random.seed(0)
    total = 0
    with patched(mode=mode, report=True) as report:
        for sample in OPS[name].sample_inputs("cpu", dtype, True):
            total += 1
            leaves = [sample.input, *(a for a in sample.args if a.requires_grad)]
            results = []
            for function in (getattr(F, name), functools.partial(by_torch, name)):
                loss = function(sample.input, *sample.args, **sample.kwargs)
                incoming = torch.linspace(-1, 2, max(loss.numel(), 1), dtype=dtype)
                incoming = incoming[: loss.numel()].reshape(loss.shape)
                results.append([loss, *torch.autograd.grad(loss, leaves, incoming)])
            torch.testing.assert_close(*results)
    assert total >= {"cross_entropy": 20, "mse_loss": 5}[name]
    assert report.taken[name] >= 0.5 * total, str(report)


@every_way
def test_torch_error_inputs(mode: bool) -> None:
    """Those of torch's module, as its functions have none, and of functions that get some."""
    info = next(info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)
    errors = list(info.module_error_inputs_func(info, "cpu", torch.float32, False, training=True))
    assert len(errors) >= 7
    with patched(mode=mode):
        for error in errors:
            make = error.module_error_input.constructor_input
            call = error.module_error_input.forward_input
            with pytest.raises(error.error_type, match=error.error_regex):
                torch.nn.CrossEntropyLoss(*make.args, **make.kwargs)(*call.args, **call.kwargs)
        for name in ORIGINALS:
            function = OPS[name].error_inputs_func
            for error in () if function is None else OPS[name].error_inputs("cpu"):
                sample = error.sample_input
                with pytest.raises(error.error_type, match=error.error_regex):
                    getattr(F, name)(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.cpu
@every_way
def test_class_index_out_of_range(mode: bool) -> None:
    """Found by the kernel only; the error is torch's all the same."""
    calls = ((X, T + 37), (X, T - 1), (X[0], T[0] + 37), (IMAGE, IMAGE[:, 0].long() + 9))
    with patched(mode=mode):
        for args in calls:
            want = outcome(by_torch, "cross_entropy", *args)
            assert outcome(lambda *a: F.cross_entropy(*a), *args) == want
            assert want[0] is IndexError
