"""mbkern.patched() under compilers, transforms and tracers."""

from __future__ import annotations

import functools
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patched_inputs import ARGUMENTS, OURS, T, W, X, Y, every_loss, every_way
from settings import older_torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy as imported_cross_entropy

from mbkern._patched import patched

pytestmark = pytest.mark.usefixtures("one_thread", "patches_taken_back")
reaches_compiled = pytest.mark.skipif(
    older_torch("2.13"), reason="NOT CHECKED: older compilers call torch's own function"
)


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


@reaches_compiled
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


@reaches_compiled
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


@reaches_compiled
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


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit:FutureWarning")
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
