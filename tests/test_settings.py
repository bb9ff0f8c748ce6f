"""Every setting that torch can call a loss in, with cross_entropy and every loss of elements, in
every dtype: torch's result, or the stated refusal. docs/support.md is made of the same list."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import support_matrix
import torch
from cases import CASES, DTYPES, Case
from settings import SETTINGS, Setting, older_torch
from settings.autograd import backward
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of many settings
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3, torch.float64: 1e-12}
SHAPE = (6, 9)


def stock(case: Case) -> Callable[..., Tensor]:
    """torch's function, or the nearest that it has."""
    if case.torch is not None and case.name != "gaussian_nll_loss":  # which looks at var
        return case.torch

    def half(x: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
        return torch.nn.functional.mse_loss(x, t, reduction=reduction) / 2

    return half if case.name == "half_squared_error" else as_autocast_does(case.reference)


def as_autocast_does(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A formula whose 16-bit arguments autocast converts, as those of torch's losses."""

    def converted(x: Tensor, t: Tensor, **options: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu") and x.dtype.itemsize == 2:
            x, t = x.float(), t.float()
        return formula(x, t, **options)

    return converted


def same(a: Tensor, b: Tensor, strict: bool = True) -> bool:
    """Whether dtypes, shapes and NaN agree; ``strict``: also of what a formula's order decides."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Torch (or the formula) makes derivatives of 0 by a mask, which passes 0 where 0 times the
    # incoming gradient is NaN; or adds infinite terms of opposite signs.
    decided = (a.isnan() & (b == 0)) | (a.isinf() & b.isnan())
    differ = a.isnan() != b.isnan()
    return not bool((differ if strict else differ & ~decided).any())


#: A row loss and two element-wise ones, of which the normal run has every setting and dtype. All
#: others share their code but the formula, and take turns there, in float32; the slow run has the
#: rest, but for Inductor's, of float32 only: ten seconds each.
WHOLE = ("cross_entropy", "mse_loss", "half_squared_error")
TURNS = 7
#: Whose gradient does not depend on the input, here and in torch: it has no graph.
LINEAR = ("quantile_loss", "hinge_embedding_loss", "hinge_loss", "margin_ranking_loss", "kl_div")


def marks(i: int, case: Case, k: int, setting: Setting, dtype: torch.dtype) -> list[Any]:
    """Those of a cell that not every run has."""
    usual = case.name in WHOLE or (k % TURNS == i % TURNS and dtype is torch.float32)
    return [] if usual and not setting.slow else [pytest.mark.slow]


CELLS = [
    pytest.param(
        case, setting, dtype, marks=marks(i, case, k, setting, dtype),
        id=f"{case.name}-{setting.name.replace('`', '')}-{str(dtype)[6:]}",
    )
    for i, case in enumerate(CASES)
    for k, setting in enumerate(SETTINGS)
    for dtype in DTYPES
    if case.name in WHOLE or dtype is torch.float32 or "Inductor" not in setting.name
]  # fmt: skip


@pytest.mark.parametrize(("case", "setting", "dtype"), CELLS)
def test_setting(setting: Setting, case: Case, dtype: torch.dtype) -> None:
    if older_torch(setting.since):
        pytest.skip(f"NOT CHECKED: needs torch {setting.since}")
    sample = case.sample(SHAPE, dtype)
    x, target = sample.input, sample.target
    ours, theirs = case.function, stock(case)
    if setting.refusal:
        if setting.name == "complex" and sample.options:  # a third tensor is not built of these
            ours = functools.partial(ours, **sample.options)
        with pytest.raises(Exception, match=setting.refusal):
            setting.run(ours, x, target)
        return
    if case.name == "soft_margin_loss" and "jacrev(jacrev)" in setting.name:
        theirs = case.reference  # torch's function has no such derivative
    if case.name in LINEAR and "create_graph" in setting.name:
        for function in (ours, theirs):
            with pytest.raises(RuntimeError, match="does not require grad"):
                setting.run(function, x, target)
        return
    got, want = (setting.run(function, x, target) for function in (ours, theirs))
    plain = backward(ours, x, target)
    strict = case.name in WHOLE or "incoming" not in setting.name
    assert len(got) == len(want) > 0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g is not None, f"result {i}"
        assert w is not None, f"result {i}"
        assert same(g, w, strict), f"result {i}: {g}, torch {w}"
        error = (g.double() - w.double()).nan_to_num().abs().max()
        scale = w.double().nan_to_num().abs().max() + 0.1
        assert error <= TOLERANCE[dtype] * scale, f"result {i}: {g}, torch {w}"
        if setting.exact:
            eager = plain[g.shape == x.shape]
            assert eager is not None
            assert torch.equal(g, eager.to(g.dtype)), f"result {i}: {g}, eager {eager}"


def test_the_documentation_is_fresh() -> None:
    assert support_matrix.PATH.read_text() == support_matrix.text(), (
        "docs/support.md is old: python tests/support_matrix.py"
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_no_recompilation(backend: str) -> None:
    """Twenty batch sizes: one compilation, of the first dynamic one."""
    for case in CASES if backend == "aot_eager" else CASES[:3]:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        call = torch.compile(case.function, fullgraph=True, backend=counter)
        for items in range(2, 22 if case.name in WHOLE else 6):
            sample = case.sample((items, 9), torch.float32)
            x, target = sample.input.requires_grad_(), sample.target
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(target, 0)
            value = call(x, target)
            value.backward()
            assert torch.equal(value, case.function(x, target))
        assert counter.frame_count == 1, case.name


@pytest.mark.parametrize("option", ["denominator", "grad_scale"])
@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss"])
def test_a_number_that_changes_is_compiled_once_more_at_most(name: str, option: str) -> None:
    """The tokens of each step, as a Python number."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = next(c for c in CASES if c.name == name)
    call = torch.compile(case.function, fullgraph=True, backend=counter)
    sample = case.sample((6, 9), torch.float32)
    for number in (3.0, 4.5, 7.25, 9.125, 1e-3):
        grads = []
        for function in (call, case.function):
            x = sample.input.clone().requires_grad_()
            value = function(x, sample.target, **{option: number})
            value.backward()
            grads.append((value, x.grad))
        (value, grad), (eager, eager_grad) = grads
        assert torch.equal(value, eager)
        assert torch.equal(grad, eager_grad)
    assert counter.frame_count <= 2


OPTIONS: list[dict[str, Any]] = [
    {"weight": torch.rand(9)},
    {"sample_weight": torch.rand(6)},
    {"label_smoothing": 0.2, "ignore_index": 3},
    {"z_loss": 0.1, "softcap": 5.0},
    {"denominator": 7},
    {"denominator": torch.tensor(7.0)},
    {"grad_scale": 4.0},
    {"loss_dtype": torch.float64},
    {"reduction": "none"},
    {"reduction": "sum"},
    {"inplace": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_compiled(dtype: torch.dtype) -> None:
    """Compiled, under func.grad and under vmap equal to eager, bit by bit."""
    case = CASES[0]
    sample = case.sample(SHAPE, dtype)
    target = sample.target
    soft = torch.softmax(torch.randn(SHAPE), 1).to(dtype)
    for options in OPTIONS:
        options = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.dim() else v for k, v in options.items()
        }
        for t in (target, soft):
            if t is soft and "ignore_index" in options:
                continue

            def call(x: Tensor, t: Tensor = t, options: dict[str, Any] = options) -> Tensor:
                return case.function(x, t, **options)

            plain = {k: v for k, v in options.items() if k != "inplace"}
            x = sample.input.detach().clone().requires_grad_()
            want = case.function(x, t, **plain)
            (grad,) = torch.autograd.grad(want.sum(), x)
            torch._dynamo.reset()
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            value = compiled(x)
            assert torch.equal(value, want), options
            assert torch.equal(torch.autograd.grad(value.sum(), x)[0], grad), options
            transformed = torch.func.grad(lambda x: call(x).sum())(x.detach())
            assert torch.equal(transformed, grad), options
            many = torch.vmap(call)(x.detach().expand(2, *SHAPE))
            assert torch.equal(many[1], want), options


def test_refused_while_tracing() -> None:
    """What eager refuses is refused by a trace, too."""
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for options in ({"softcap": 0.0}, {"softcap": float("inf")}, {"reduction": "some"}):

        def call(x: Tensor, options: dict[str, Any] = options) -> Tensor:
            return CASES[0].function(x, target, **options)

        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager")
        for function, argument in ((call, x), (compiled, x), (torch.vmap(call), x[None])):
            with pytest.raises(Exception, match=r"softcap must be positive|not a valid reduction"):
                function(argument)
