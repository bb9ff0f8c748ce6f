"""The ways in which torch calls a loss: one row a setting, tried with every loss and dtype.

A setting runs a function (mbkern's, or torch's) on an input and a target and returns tensors that
must agree, or it names the refusal that must come. ``test_settings.py`` runs the rows;
``support_matrix.py`` makes docs/support.md of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.testing
from guarded import in_child
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

LossFunction = Callable[..., Tensor]
Run = Callable[[LossFunction, Tensor, Tensor], Sequence[Tensor | None]]

SETTINGS: list[Setting] = []


@dataclass(frozen=True)
class Setting:
    """One way to call a loss.

    Attributes:
        name: as in the documentation.
        group: its heading there.
        run: (function, input, target) to results.
        refusal: a pattern of mbkern's error message, where the call is refused.
        exact: results have the bits of a plain call of mbkern's function.
        note: for the documentation.
    """

    name: str
    group: str
    run: Run
    refusal: str = ""
    exact: bool = False
    note: str = ""


def setting(group: str, name: str, **attributes: Any) -> Callable[[Run], Run]:
    """Add the function to the list."""

    def add(run: Run) -> Run:
        SETTINGS.append(Setting(name, group, run, **attributes))
        return run

    return add


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gradient(value: Tensor, x: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(value.sum(), x, **options)[0]


# ---- autograd ------------------------------------------------------------------------------------


@setting("Autograd", "backward", exact=True)
def backward(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    value = f(x, t)
    value.backward()
    return value, x.grad


@setting("Autograd", "`reduction='none'`, any incoming gradient")
def unreduced(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    results: list[Tensor | None] = []
    value = f(x, t, reduction="none")
    base = torch.linspace(-1, 2, 2 * value.numel(), dtype=value.dtype)
    strided = base[::2].reshape(value.shape)
    for incoming in (strided, torch.zeros(()).to(value).expand_as(value), strided * torch.nan):
        y = leaf(x)
        before = incoming.clone()
        f(y, t, reduction="none").backward(incoming)
        assert torch.equal(incoming.nan_to_num(), before.nan_to_num())
        results.append(y.grad)
    return results


@setting("Autograd", "`no_grad`, `inference_mode`", exact=True)
def without_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with torch.no_grad():
        first = f(leaf(x), t)
    with torch.inference_mode():
        second = f(x, t)
    return first, second.clone()


@setting("Autograd", "`retain_graph`, backward twice", exact=True)
def retain_graph(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    value = f(x, t)
    return gradient(value, x, retain_graph=True), gradient(value, x)


@setting("Autograd", "double backward (`create_graph`)", note="by formulas of torch operations")
def double_backward(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    first = gradient(f(x, t), x, create_graph=True)
    v = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x)
    return first, gradient((first * v).sum(), x)


@setting("Autograd", "forward mode (`forward_ad`)", note="by formulas of torch operations")
def dual(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with forward_ad.dual_level():
        value = f(forward_ad.make_dual(x, torch.ones_like(x)), t)
        return tuple(forward_ad.unpack_dual(value))


@setting("Autograd", "incoming gradient not finite, ignored items")
def not_finite(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    if not t.is_floating_point():
        t = t.clone()
        t[1] = -100
    results: list[Tensor | None] = []
    for factor in (torch.inf, -torch.inf, torch.nan):
        y = leaf(x)
        value = f(y, t)
        value.backward(torch.tensor(factor, dtype=value.dtype))
        assert y.grad is not None
        # Of an infinite factor torch's p - 1 makes NaN at the target, mbkern's -inf.
        results.append(y.grad[1] if factor == factor else y.grad)
    return results


@setting("Tensors", "another default device", exact=True)
def default_device(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with torch.device("meta"):
        return backward(f, x, t)


@setting("Autograd", "`is_grads_batched`")
def batched_gradients(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    value = f(x, t)
    incoming = torch.arange(3).to(value)
    return torch.autograd.grad(value, x, incoming, is_grads_batched=True)


@setting("Autograd", "`checkpoint`, both kinds", exact=True)
def checkpointed(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    results = []
    for reentrant in (False, True):
        y = leaf(x)
        results.append(gradient_of(checkpoint(f, y, t, use_reentrant=reentrant), y))
    return results


def gradient_of(value: Tensor, x: Tensor) -> Tensor:
    value.backward()
    assert x.grad is not None
    return x.grad


@setting("Autograd", "`saved_tensors_hooks`", exact=True)
def hooks(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: s.clone(), lambda s: s):
        value = f(x, t)
    return value, gradient(value, x)


@setting("Autograd", "anomaly mode", exact=True)
def anomaly(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            return backward(f, x, t)


# ---- mixed precision -----------------------------------------------------------------------------


@setting("Mixed precision", "autocast")
def autocast(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = f(x, t)
    return value, gradient(value, x)


@setting("Mixed precision", "GradScaler")
def grad_scaler(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    value = f(x, t)
    scaler.scale(value).backward()
    return value, x.grad


@setting("Mixed precision", "deterministic, memory filled with NaN", exact=True)
def deterministic(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return backward(f, x, t)
    finally:
        torch.use_deterministic_algorithms(before)


# ---- compilers -----------------------------------------------------------------------------------


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


class Module(torch.nn.Module):
    def __init__(self, function: LossFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


@setting("Compilers", "`torch.export`, trained afterwards", note="by formulas of torch operations")
def export(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    results: list[Tensor | None] = []
    for strict in (False, True):
        program = torch.export.export(Module(f), (leaf(x), t), strict=strict)
        y = leaf(x)
        value = program.module()(y, t)
        results += [value, gradient(value, y)]
    return results


@setting("Compilers", "`make_fx` before dispatch", exact=True)
def traced_before_dispatch(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    graph = make_fx(lambda x, t: f(x, t), pre_dispatch=True)(x, t)
    return (graph(x, t),)


@setting("Compilers", "`make_fx`", exact=True)
def traced(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    graph = make_fx(lambda x, t: f(x, t), tracing_mode="fake")(x, t)
    return (graph(x, t),)


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


# ---- transforms ----------------------------------------------------------------------------------


@setting("torch.func", "`grad`", exact=True)
def func_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    grad, value = torch.func.grad_and_value(f)(x, t)
    return value, grad


def batches(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack((x, -x, x * 2)), torch.stack((t, t.flip(0), t))


@setting("torch.func", "`vmap`")
def vmap(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    many, targets = batches(x, t)
    return (
        torch.vmap(f)(many, targets),
        torch.vmap(f, (0, None))(many, t),
        torch.vmap(f, (None, 1))(x, targets.movedim(0, 1)),
    )


@setting("torch.func", "`vmap(grad)`")
def vmap_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (torch.vmap(torch.func.grad(f))(*batches(x, t)),)


@setting(
    "torch.func", "`torch.compile` of `grad`, `vmap(grad)`", note="by formulas of torch operations"
)
def compiled_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    def single(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.grad(f)(x, t)

    def many(x: Tensor, t: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(f))(x, t)

    torch._dynamo.reset()
    one, each = (
        torch.compile(call, fullgraph=True, backend="aot_eager") for call in (single, many)
    )
    return one(x, t), each(*batches(x, t))


@setting("torch.func", "`jacrev`")
def jacrev(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (torch.func.jacrev(lambda x: f(x, t, reduction="none"))(x),)


@setting("torch.func", "`jvp`, `jacfwd`", note="by formulas of torch operations")
def jacfwd(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (
        *torch.func.jvp(lambda x: f(x, t), (x,), (torch.ones_like(x),)),
        torch.func.jacfwd(lambda x: f(x, t))(x),
    )


@setting("torch.func", "`hessian`, `jacrev(jacrev)`", note="by formulas of torch operations")
def hessian(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    def value(x: Tensor) -> Tensor:
        return f(x, t)

    return torch.func.hessian(value)(x), torch.func.jacrev(torch.func.jacrev(value))(x)


@setting("torch.func", "`vmap(jacrev(jacrev))`", note="by formulas of torch operations")
def vmap_hessian(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    many, targets = batches(x, t)
    nested = torch.func.jacrev(torch.func.jacrev(f))
    return torch.vmap(nested)(many, targets), torch.vmap(torch.func.hessian(f))(many, targets)


@setting("torch.func", "`functionalize`, `linearize`", note="by formulas of torch operations")
def functionalize(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    value, pushed = torch.func.linearize(lambda x: f(x, t), x)
    return (
        torch.func.functionalize(f)(x, t),
        torch.func.grad(torch.func.functionalize(f))(x, t),
        torch.func.functionalize(torch.func.grad(f))(x, t),
        value,
        pushed(torch.ones_like(x)),
    )


# ---- tensors -------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


@setting("Tensors", "subclass through `__torch_function__`", exact=True)
def subclass(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(x)
    value = f(y.as_subclass(Subclass), t)
    assert type(value) is Subclass
    return value.as_subclass(Tensor), gradient(value.as_subclass(Tensor), y)


@setting("Tensors", "lazily negated view", exact=True)
def negated(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(-x)
    value = f(torch._neg_view(y), t)
    return value, -gradient(value, y)


@setting("Tensors", "FlopCounterMode and other dispatch modes", exact=True)
def dispatch_mode(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with FlopCounterMode(display=False):
        return backward(f, x, t)


@setting("Tensors", "DTensor", refusal="DTensor|sharding strategy|mixed torch.Tensor")
def dtensor(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        y, s = (DTensor.from_local(a, mesh, [Replicate()]) for a in (x, t))
        return (f(y, s),)
    finally:
        torch.distributed.destroy_process_group()


@setting("Tensors", "sparse", refusal="layout|[Ss]parse")
def sparse(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (f(x.to_sparse(), t),)


@setting("Tensors", "quantised", refusal="quint8|qint8|[Qq]uantized")
def quantised(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (f(torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), t),)


@setting("Tensors", "complex", refusal="complex")
def complex_numbers(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (f(torch.complex(x.float(), x.float()), t),)


# ---- processes and memory ------------------------------------------------------------------------


@setting("Processes", "several Python threads at once", exact=True)
def threads(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: backward(f, x, t), range(16)))
    return [tensor for result in results for tensor in result]


@setting("Processes", "forked child", exact=True)
def forked(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(x)
    value = f(y, t)
    shared = [torch.zeros_like(a).share_memory_() for a in (value.detach(), x)]

    def call() -> None:
        torch.set_num_threads(1)
        for to, result in zip(shared, backward(f, x, t), strict=True):
            assert result is not None
            to.copy_(result.detach())

    in_child(call)
    return shared


@setting("Processes", "copied and pickled modules", exact=True)
def modules(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (copy.deepcopy(Module(f))(x, t),)
