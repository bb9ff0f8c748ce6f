"""What autograd promises around the kernels: whose memory a gradient is, and when it is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, REDUCTIONS, Case, Sample, check

from mbkern import _C, _composite

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
HALF = (torch.bfloat16, torch.float16)


# ---- whose memory a gradient is -----------------------------------------------------------------


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Where the tensors lie that a kernel is called with."""
    seen: set[int] = set()

    def spy(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(fields: tuple[Any, ...]) -> Any:
            seen.update(f.data_ptr() for f in fields if isinstance(f, torch.Tensor))
            return kernel(fields)

        return call

    for name in ("row_loss", "pointwise_loss"):
        monkeypatch.setattr(_C, name, spy(getattr(_C, name)))
    plain_loss = _C.plain_loss

    def plain(*args: Any) -> Any:
        done = plain_loss(*args)
        if isinstance(done, tuple):
            seen.update(grad.data_ptr() for grad in done[1] if grad is not None)
        return done

    monkeypatch.setattr(_C, "plain_loss", plain)
    return seen


@every_case
def test_grad_is_the_kernels_own_output(case: Case, addresses: set[int]) -> None:
    """Nothing is copied on the way to ``.grad``, whatever comes in; with retain_graph a copy is."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        for factor in (1, 3):
            addresses.clear()
            x, target = case.leaf(dtype)
            loss = case.function(x, target, reduction=reduction)
            (loss.sum() * factor).backward()
            assert x.grad is not None
            assert x.grad.data_ptr() in addresses, (dtype, reduction, factor)
    addresses.clear()
    x, target = case.leaf(torch.float32)
    case.function(x, target).backward(retain_graph=True)
    assert x.grad is not None
    assert x.grad.data_ptr() not in addresses


# ---- several backwards --------------------------------------------------------------------------


@every_case
def test_retain_graph(case: Case) -> None:
    """Each backward has its own factor and memory; the one after the last retained raises."""
    for dtype, reduction, inplace in itertools.product(DTYPES, REDUCTIONS, (False, True)):
        label = f"{dtype} {reduction} inplace={inplace}"
        x, target = case.leaf(dtype)
        want = {}
        for factor in (2, -4, 1):
            loss = case.function(x, target, reduction=reduction).sum()
            (want[factor],) = torch.autograd.grad(loss * factor, x)
        logits = x + 0
        total = case.function(logits, target, reduction=reduction, inplace=inplace).sum()
        first = torch.autograd.grad(total * 2, logits, retain_graph=True)[0]
        kept = first.clone()
        second = torch.autograd.grad(total * -4, logits, retain_graph=True)[0]
        third = torch.autograd.grad(total, logits)[0]
        assert torch.equal(first, kept), label
        assert torch.equal(first, want[2]), label
        assert torch.equal(second, want[-4]), label
        assert torch.equal(third, want[1]), label
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(total, logits)


def of_leaves(
    case: Case, sample: Sample, **more: Any
) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    """The loss as a function of its differentiable arguments, and these."""
    sample, leaves = case.leaves(sample)
    fixed = case.tensors(sample)

    def function(*values: torch.Tensor) -> torch.Tensor:
        tensors = fixed | dict(zip(leaves, values, strict=True))
        return case.function(**sample.options | tensors | more)

    return function, tuple(leaves.values())


def again(grad: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The derivative of grad . v; 0 where the gradient is piecewise constant."""
    if not grad.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad((grad * v).sum(), x)[0]


#: Where torch differentiates by what a value was raised to, which differences do not show.
STRAIGHT_THROUGH = ("least",)


@every_case
def test_double_backward(case: Case) -> None:
    """Derivatives of derivatives by differences, with every option, through all that has one."""
    for variation, reduction in itertools.product(case.variations, REDUCTIONS):
        if variation.name in STRAIGHT_THROUGH:
            continue
        sample = case.sample((3, 5), torch.float64, variation)
        function, leaves = of_leaves(case, sample, reduction=reduction)
        assert torch.autograd.gradgradcheck(function, leaves), (variation.name, reduction)


@every_case
def test_gradcheck(case: Case) -> None:
    """Numerical derivatives by every differentiable argument, with every option."""
    for variation in case.variations:
        if variation.name in STRAIGHT_THROUGH:
            continue
        sample = case.sample((4, 5), torch.float64, variation)
        for reduction in ("none", "mean"):
            if variation.name == "all ignored" and reduction == "mean":
                continue  # NaN
            function, leaves = of_leaves(case, sample, reduction=reduction)
            assert len(leaves) == len(case.differentiable) or case.has_rows
            assert torch.autograd.gradcheck(function, leaves), (variation.name, reduction)


def clamps_to_zero() -> bool:
    x = torch.zeros((), requires_grad=True)
    return torch.autograd.grad(x.clamp_min(0), x)[0].item() == 0.0


#: First arguments, second ones, and options: where a derivative jumps, and beside it.
KINKS: dict[str, tuple[list[float], list[float], dict[str, float]]] = {
    "l1_loss": ([0.0, 1.0, -1.0], [0.0, 1.0, -0.5], {}),
    "smooth_l1_loss": ([0.5, -0.5, 0.25, 0.0], [0.0] * 4, {"beta": 0.5}),
    "huber_loss": ([0.5, -0.5, 0.25, 0.0], [0.0] * 4, {"delta": 0.5}),
    "hinge_embedding_loss": ([0.5, 0.5, 0.25, 1.0], [-1.0, 1.0, -1.0, 0.5], {"margin": 0.5}),
    "hinge_loss": ([0.5, -0.5, 0.25, 1.0], [1.0, -1.0, 1.0, 1.0], {"margin": 0.5}),
    "squared_hinge_loss": ([0.5, -0.5, 0.25, 1.0], [1.0, -1.0, 1.0, 1.0], {"margin": 0.5}),
    "margin_ranking_loss": ([0.5, 0.0, -0.5, 1.0], [0.0, 0.5, 0.0, 0.0], {"margin": 0.5}),
    "quantile_loss": ([0.0, 1.0, 2.0], [0.0, 1.0, 1.0], {"quantile": 0.9}),
    "binary_cross_entropy": ([0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.5, 1.0], {}),
    "kl_div": ([0.0, -1.0], [1.0, 0.25], {}),
    "poisson_nll_loss": ([0.5, 0.5], [1.0, 1.5], {"full": True}),
    "gaussian_nll_loss": ([0.5, 0.0], [0.0, 0.0], {"eps": 0.5}),  # the variance
}


#: What torch clamps: from 2.14 on with another slope at the bound.
CLAMPED = ("hinge_embedding_loss", "margin_ranking_loss") if clamps_to_zero() else ()


@pytest.mark.parametrize("name", KINKS)
def test_kinks(name: str) -> None:
    """torch's subgradients, of 2.13 and before; quantile_loss, that torch has not, has 0."""
    (case,) = (case for case in CASES if case.name == name)
    first, second, options = KINKS[name]
    for dtype in (torch.float32, torch.float64):
        x, y = (torch.tensor(values, dtype=dtype) for values in (first, second))
        sample, leaves = case.leaves(Sample(x, y, dict(options)))
        if name == "binary_cross_entropy":  # by the target torch's is infinite there
            del leaves["target"]
        options = sample.options | {"reduction": "none"}
        got, want = (
            torch.autograd.grad(f(sample.input, sample.target, **options).sum(), leaves.values())
            for f in (
                case.function,
                case.reference if name in CLAMPED else case.torch or case.reference,
            )
        )
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)
        loss = case.function(sample.input, sample.target, **options).sum()
        formula = torch.autograd.grad(loss, leaves.values(), create_graph=True)
        for mine, by_formula in zip(got, formula, strict=True):
            torch.testing.assert_close(mine, by_formula.detach())
        if name == "quantile_loss":
            assert not got[0][:2].any()


@every_case
def test_hessian_vector_products(case: Case) -> None:
    """In every dtype, and the first gradient is that of a plain backward, to rounding."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        x, target = case.leaf(dtype)
        v = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
        reference, wide = case.exact(x, target, reduction=reduction)

        def product(loss: torch.Tensor, leaf: torch.Tensor, v: Any = v) -> list[torch.Tensor]:
            (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
            return [grad, again(grad, leaf, v.to(grad.dtype))]

        got = product(case.function(x, target, reduction=reduction), x)
        for g, w in zip(got, product(reference, wide), strict=True):
            tolerance = 64 * torch.finfo(dtype).eps * (w.abs().max() + 0.1)  # p - 1 cancels
            assert (g.double() - w).abs().max() <= tolerance, (dtype, reduction)


@every_case
def test_double_backward_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the logits are gone, or a loss has no formula."""
    x, target = case.leaf(torch.float32)
    loss = case.function(x * 1, target, inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True"):
        torch.autograd.grad(loss, x, create_graph=True)
    monkeypatch.setattr(_composite, "is_available", lambda loss: False)
    for reduction in REDUCTIONS:
        loss = case.function(x, target, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match=rf"{case.name} .*create_graph=True"):
            torch.autograd.grad(loss, x, create_graph=True)


@every_case
def test_double_backward_of_what_has_changed(case: Case) -> None:
    """Weights that were written to are missed; a denominator counts as it was in forward."""
    x, target = case.leaf(torch.float32)
    weight = torch.rand(6 if case.has_rows else (6, 70)) + 0.5
    for reduction in REDUCTIONS:
        loss = case.function(x, target, reduction=reduction, sample_weight=weight).sum()
        weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)
    results = []
    for dtype, change in itertools.product((torch.float32, torch.bfloat16), (1.0, 3.0)):
        x, target = case.leaf(dtype)
        denominator = torch.tensor(5.0)
        loss = case.function(x, target, denominator=denominator)
        denominator.mul_(change)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        results += [(grad.detach(), again(grad, x, 2 * grad.detach()))]
    for before, after in (results[:2], results[2:]):
        assert all(map(torch.equal, before, after))


@every_case
def test_hooks(case: Case) -> None:
    """On tensors and nodes, that change what passes: as with torch operations."""

    def run(function: Callable[..., torch.Tensor], **options: Any) -> list[torch.Tensor]:
        x, target = case.leaf(torch.float64)
        seen: list[torch.Tensor] = []
        logits = x * 0.5
        logits.retain_grad()
        logits.register_hook(lambda g: (seen.append(g.clone()), g * 3)[1])
        loss = function(logits, target, **options)
        loss.register_hook(lambda g: g * 5)
        loss.grad_fn.register_prehook(lambda g: (g[0] * -7,))
        x.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
        loss.backward()
        return [*seen, logits.grad, x.grad]

    for options in ({}, {"inplace": True}, {"grad_scale": 3.0}):
        for got, want in zip(run(case.function, **options), run(case.reference), strict=True):
            torch.testing.assert_close(got, want)


def test_several_losses_at_once() -> None:
    """One backward through many losses, each with a factor of its own; the input of all counts."""
    grads = []
    for functions in ([case.function for case in CASES], [case.reference for case in CASES]):
        random = torch.Generator().manual_seed(5)
        x = torch.randn(6, 70, generator=random, dtype=torch.float64).requires_grad_()
        chance = torch.sigmoid(x)
        losses = [
            function(
                chance if case.name == "binary_cross_entropy" else x,
                case.sample((6, 70), torch.float64).target,
            )
            for function, case in zip(functions, CASES, strict=True)
        ]
        factors = [torch.tensor(k + 0.5, dtype=torch.float64) for k in range(len(losses))]
        grads.append(torch.autograd.grad(losses, x, factors)[0])
    torch.testing.assert_close(*grads)


@every_case
def test_one_graph_many_threads(case: Case) -> None:
    for reduction in ("mean", "none"):
        x, target = case.leaf(torch.float32)
        loss = case.function(x, target, reduction=reduction).sum()
        (want,) = torch.autograd.grad(loss, x, retain_graph=True)

        def work(_: int, loss: Any = loss, x: Any = x) -> torch.Tensor:
            (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
            return grad

        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(g, want) for g in pool.map(work, range(40))), reduction


# ---- incoming gradients -------------------------------------------------------------------------


@every_case
def test_incoming_scalars(case: Case) -> None:
    """Any number, also NaN and 0, in whatever dtype the loss has."""
    for dtype, result, reduction in itertools.product(DTYPES, DTYPES, ("mean", "sum")):
        x, target = case.leaf(dtype)
        reference, wide = case.exact(x, target, reduction=reduction)
        (unit,) = torch.autograd.grad(reference, wide)
        for factor in (1.0, 0.0, -1.0, 0.375, 1000.0, float("nan")):
            loss = case.function(x, target, reduction=reduction, loss_dtype=result)
            got = torch.autograd.grad(loss, x, torch.tensor(factor, dtype=result))[0]
            label = f"{case.name} {dtype} {reduction} * {factor} in {result}"
            if factor == 0:
                assert torch.equal(got, torch.zeros_like(got)), label
            check(got, unit * factor, None, label)


@every_case
def test_incoming_of_unreduced_losses(case: Case) -> None:
    """Expanded, transposed, with gaps, zero, negative and NaN: each item gets its own."""
    shape = (4, 30, 5) if case.has_rows else (4, 5)
    for dtype in DTYPES:
        x, target = case.leaf(dtype, shape)
        items = torch.arange(20.0).reshape(5, 4).to(dtype) / 4 - 2
        odd = items.t().clone()
        odd[1, 2], odd[3] = float("nan"), 0
        for name, incoming in {
            "transposed": items.t(),
            "expanded": items[0, :1].expand(4, 5),
            "expanded row": items[:, 0].expand(4, 5),
            "gaps": items.repeat(1, 2)[:, ::2].t(),
            "offset": items.flatten().as_strided((4, 5), (3, 1), 2),
            "negated": torch._neg_view(items.t().contiguous()),
            "NaN and zero": odd,
        }.items():
            loss = case.function(x, target, reduction="none")
            before = incoming.clone()
            got = torch.autograd.grad(loss, x, incoming)[0]
            assert torch.equal(incoming.nan_to_num(), before.nan_to_num()), f"{name} was written"
            reference, wide = case.exact(x, target, reduction="none")
            want = torch.autograd.grad(reference, wide, incoming.double())[0]
            if not case.has_rows:  # NaN, also times a derivative of 0; torch masks hinges
                want[incoming.isnan()] = float("nan")
            check(got, want, None, f"{case.name} {dtype} {name}")


@every_case
def test_many_incoming_gradients(case: Case) -> None:
    """is_grads_batched: each has the gradient of a backward of its own; ignored items have none."""
    factors = (1.0, -0.3, 0.0, float("inf"), float("nan"))
    for dtype, hint in itertools.product((torch.float32, *HALF), (None, 3.0)):
        x, target = case.leaf(dtype)
        if case.has_rows:
            target[2] = -100
        options = {"grad_scale": hint, "loss_dtype": torch.float32}
        loss = case.function(x, target, **options)
        many = torch.autograd.grad(loss, x, torch.tensor(factors), is_grads_batched=True)[0]
        for got, factor in zip(many, factors, strict=True):
            plain = case.function(x, target, **options)
            (want,) = torch.autograd.grad(plain, x, torch.tensor(factor))
            label = f"{dtype} hint {hint} factor {factor}"
            torch.testing.assert_close(got, want, equal_nan=True, msg=label)
            assert not (case.has_rows and got[2].any()), label


# ---- autocast, no_grad, inference ---------------------------------------------------------------


#: Of two dtypes torch has that of one argument for the result, or an error.
NOT_PROMOTED = (
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "soft_margin_loss",
    "hinge_embedding_loss",
)


def expected_dtype(case: Case, low: torch.dtype | None, a: torch.dtype, b: torch.dtype) -> Any:
    """What differs from torch: results of two dtypes, and gaussian_nll_loss under autocast."""
    if not (a is not b and case.name in NOT_PROMOTED) and case.name != "gaussian_nll_loss":
        return None
    both = torch.promote_types(a, b)
    return both if low is None else torch.promote_types(both, torch.float32)


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")  # of kl_div
@pytest.mark.parametrize("case", [c for c in CASES if c.torch], ids=lambda case: case.name)
def test_result_dtypes(case: Case) -> None:
    """torch's, for every pair of dtypes, with and without autocast."""
    assert case.torch is not None
    wrong = []
    for low, a, b in itertools.product((None, *HALF), DTYPES, DTYPES):
        x = torch.ones(3, 4, dtype=a)
        y = torch.full((3, 4), 0.25, dtype=b)
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            got = case.function(x, y).dtype
            want = expected_dtype(case, low, a, b) or case.torch(x, y).dtype
        if got is not want:
            wrong.append(f"autocast {low}: {a}, {b} -> {got}, not {want}")
    assert not wrong, "\n".join(wrong)


@every_case
def test_mixed_dtypes(case: Case) -> None:
    """Both arguments count with all their digits; gradients have their argument's dtype.

    fp32 probabilities (of mix-up, say) beside 16-bit logits are the common case.
    """
    sample = case.sample((6, 70), torch.float64)
    y = sample.target
    if case.has_rows:
        y = torch.rand(6, 70, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 35
    for a, b in itertools.permutations(DTYPES, 2):
        both = case.has_rows or "target" in case.differentiable or len(case.arguments) > 2
        pair = [t.detach().to(d) for t, d in ((sample.input, a), (y, b))]
        leaves = [t.requires_grad_() for t in pair[: 1 + both]]
        pair[:1] = leaves[:1]
        wide = [t.detach().double() for t in pair]
        wide_leaves = [t.requires_grad_() for t in wide[: 1 + both]]
        for reduction in REDUCTIONS:
            got = case.function(*pair, reduction=reduction)
            want = case.reference(*wide, reduction=reduction)
            label = f"{case.name} {a} {b} {reduction}"
            check(got, want, None, f"{label}: loss")
            grads = torch.autograd.grad(got.sum(), leaves)
            exact = torch.autograd.grad(want.sum(), wide_leaves)
            for name, mine, other in zip(("input", "target"), grads, exact, strict=False):
                check(mine, other, None, f"{label}: gradient of the {name}")


@every_case
def test_autocast(case: Case) -> None:
    """16-bit inputs give an fp32 loss, unrounded, and a gradient in their own dtype."""
    for dtype, reduction in itertools.product(HALF, REDUCTIONS):
        x, target = case.leaf(dtype)
        with torch.autocast("cpu", dtype):
            loss = case.function(x, target, reduction=reduction)
        assert loss.dtype is torch.float32
        want = case.function(x, target, reduction=reduction, loss_dtype=torch.float32)
        assert torch.equal(loss, want)
        pair = (torch.autograd.grad(value.sum(), x)[0] for value in (loss, want))
        got, grad = pair
        assert got.dtype is dtype
        assert torch.equal(got, grad)


@every_case
def test_without_grad(case: Case) -> None:
    """no_grad and inference_mode: the same bits, and no graph."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        x, target = case.leaf(dtype)
        want = case.function(x, target, reduction=reduction)
        assert want.requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = case.function(x, target, reduction=reduction)
                inner = case.function(x.clone(), target.clone(), reduction=reduction)
            assert not got.requires_grad
            assert torch.equal(got, want)
            assert torch.equal(inner, want)
