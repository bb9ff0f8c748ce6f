"""Every setting that torch can call a loss in, with every loss and dtype: torch's result, or the
stated refusal. The documentation's table is made of the same list."""

from __future__ import annotations

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

    return half if case.name == "half_squared_error" else case.reference


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan())


EVERY = [
    pytest.param(s, id=s.name.replace("`", ""), marks=[pytest.mark.slow] if s.slow else [])
    for s in SETTINGS
]


#: In every setting and dtype: a row loss and two element-wise ones. All others share the code of
#: these but their formula, and take turns.
WHOLE = ("cross_entropy", "mse_loss", "half_squared_error")
TURNS = 7
#: Whose derivatives of 0 torch (or the formula) makes by a mask, which a NaN does not pass.
MASKED = (
    "hinge_loss", "squared_hinge_loss", "hinge_embedding_loss", "margin_ranking_loss",
    "log_cosh_loss", "quantile_loss", "sigmoid_focal_loss", "tweedie_nll_loss",
)  # fmt: skip
CELLS = [
    pytest.param(case, *setting.values, id=f"{case.name}-{setting.id}", marks=setting.marks)
    for i, case in enumerate(CASES)
    for k, setting in enumerate(EVERY)
    if case.name in WHOLE
    or (k % TURNS == i % TURNS and not (case.name in MASKED and "incoming" in setting.id))
]


@pytest.mark.parametrize(("case", "setting"), CELLS)
def test_setting(setting: Setting, case: Case) -> None:
    if older_torch(setting.since):
        pytest.skip(f"NOT CHECKED: needs torch {setting.since}")
    for dtype in DTYPES if case.name in WHOLE else DTYPES[:1]:
        sample = case.sample(SHAPE, dtype)
        x, target = sample.input, sample.target
        if setting.refusal:
            with pytest.raises(Exception, match=setting.refusal):
                setting.run(case.function, x, target)
            continue
        got = setting.run(case.function, x, target)
        plain = backward(case.function, x, target)
        want = setting.run(stock(case), x, target)
        assert len(got) == len(want) > 0
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            label = f"{setting.name}, {case.name}, {dtype}, result {i}"
            assert g is not None, label
            assert w is not None, label
            assert same(g, w), f"{label}: {g}, torch {w}"
            error = (g.double() - w.double()).nan_to_num().abs().max()
            scale = w.double().nan_to_num().abs().max() + 0.1
            assert error <= TOLERANCE[dtype] * scale, f"{label}: {g}, torch {w}"
            if setting.exact:
                eager = plain[g.shape == x.shape]
                assert eager is not None
                assert torch.equal(g, eager.to(g.dtype)), f"{label}: {g}, eager {eager}"


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
