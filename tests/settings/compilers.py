"""Compilers, tracers, and tensors without memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from settings.setting import LossFunction, gradient, leaf, setting


def compiled(f: LossFunction, x: Tensor, t: Tensor, **options: Any) -> Sequence[Tensor | None]:
    torch._dynamo.reset()
    x = leaf(x)
    value = torch.compile(lambda x, t: f(x, t), fullgraph=True, **options)(x, t)
    value.backward()
    return value, x.grad


@setting("Compilers", "`torch.compile(fullgraph=True)`, aot_eager", exact=True)
def aot_eager(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return compiled(f, x, t, backend="aot_eager")


@setting("Compilers", "`torch.compile(fullgraph=True)`, Inductor", exact=True)
def inductor(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return compiled(f, x, t)


@setting("Compilers", "`torch.compile`, dynamic shapes", note="one compilation for all sizes")
def dynamic(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda x, t: f(x, t), fullgraph=True, backend=counter)
    results: list[Tensor | None] = []
    for items in range(2, 2 + len(x)):
        y, s = leaf(x[torch.arange(items) % len(x)]), t[torch.arange(items) % len(t)]
        torch._dynamo.mark_dynamic(y, 0)
        torch._dynamo.mark_dynamic(s, 0)
        value = call(y, s)
        value.backward()
        plain = leaf(y)
        assert torch.equal(value, f(plain, s))
        assert torch.equal(y.grad, gradient(f(plain, s), plain))
        results += [value, y.grad]
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"
    return results


@setting("Compilers", "compiled autograd", exact=True, since="2.13")
def compiled_autograd(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    torch._dynamo.reset()
    x = leaf(x)

    def step(x: Tensor, t: Tensor) -> Tensor:
        value = f(x, t)
        value.backward()
        return value

    with torch._dynamo.config.patch(compiled_autograd=True):
        value = torch.compile(step, backend="aot_eager")(x, t)
    return value, x.grad


class Module(torch.nn.Module):
    def __init__(self, function: LossFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


@setting(
    "Compilers", "`torch.export`, trained afterwards", since="2.13",
    note="by formulas of torch operations",
)  # fmt: skip
def export(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    results: list[Tensor | None] = []
    for strict in (False, True):
        program = torch.export.export(Module(f), (leaf(x), t), strict=strict)
        y = leaf(x)
        value = program.module()(y, t)
        results += [value, gradient(value, y)]
    return results


@setting(
    "Compilers", "AOTInductor of an exported module", since="2.13", slow=True,
    note="inference, by formulas of torch operations",
)  # fmt: skip
def aot_inductor(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    items = torch.export.Dim("items", min=2)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(Module(f), (x, t), dynamic_shapes=({0: items}, {0: items}))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "loss.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        return run(x, t), run(x[:3], t[:3])


def run_graph(graph: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(x)
    value = graph(y, t)
    return graph(x, t), value, gradient(value, y)


@setting("Compilers", "`make_fx` before dispatch, trained afterwards", exact=True)
def traced_before_dispatch(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return run_graph(make_fx(lambda x, t: f(x, t), pre_dispatch=True)(x, t), x, t)


@setting("Compilers", "`make_fx`, trained afterwards", exact=True)
def traced(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return run_graph(make_fx(lambda x, t: f(x, t), tracing_mode="fake")(x, t), x, t)


@setting("Compilers", "`torch.jit.trace`", note="by formulas of torch operations")
def jit_trace(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    graph = torch.jit.trace(Module(f), (torch.zeros_like(x), t), check_trace=False)
    y = leaf(x)
    value = graph(y, t)
    return value, gradient(value, y)


@setting("Compilers", "`torch.jit.script`", refusal="keyword-only arguments|Compiled functions")
def jit_script(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (torch.jit.script(f)(x, t),)


@setting("Compilers", "FakeTensorMode", note="shapes and dtypes")
def fake(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    mode = FakeTensorMode()
    y, s = mode.from_tensor(leaf(x)), mode.from_tensor(t)
    with mode:
        value = f(y, s)
        grad = gradient(value, y)
    return tuple(torch.zeros(r.shape, dtype=r.dtype) for r in (value, grad))


@setting("Compilers", "meta tensors", note="shapes and dtypes")
def meta(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(x.to("meta"))
    value = f(y, t.to("meta"))
    return tuple(torch.zeros(r.shape, dtype=r.dtype) for r in (value, gradient(value, y)))
