"""What autograd promises around the kernels: whose memory a gradient is, and when it is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ARITHMETIC, CASES, DTYPES, REDUCTIONS, Case, check, spacing

import mbkern
from mbkern import _C, _composite

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
HALF = (torch.bfloat16, torch.float16)


# ---- whose memory a gradient is ----------------------------------------------------------------


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


# ---- several backwards ---------------------------------------------------------------------------


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


@every_case
def test_double_backward(case: Case) -> None:
    """Derivatives of derivatives by differences, with every option, through all that has one."""
    for variation, reduction in itertools.product(case.variations, REDUCTIONS):
        sample = case.sample((3, 5), torch.float64, variation)
        options = sample.options | {"reduction": reduction}
        leaves = [sample.input.requires_grad_()]
        if sample.target.is_floating_point():
            leaves.append(sample.target.requires_grad_())

        def function(x: torch.Tensor, *rest: torch.Tensor, options: Any = options) -> torch.Tensor:
            return case.function(x, *(rest or (sample.target,)), **options)  # noqa: B023

        assert torch.autograd.gradgradcheck(function, leaves), (variation.name, reduction)


@every_case
def test_hessian_vector_products(case: Case) -> None:
    """In every dtype, and the first gradient is that of a plain backward, to rounding."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        x, target = case.leaf(dtype)
        v = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
        reference, wide = case.exact(x, target, reduction=reduction)

        def product(loss: torch.Tensor, leaf: torch.Tensor, v: Any = v) -> list[torch.Tensor]:
            (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
            return [grad, *torch.autograd.grad((grad * v.to(grad.dtype)).sum(), leaf)]

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


# ---- incoming gradients --------------------------------------------------------------------------


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
            "NaN and zero": odd,
        }.items():
            loss = case.function(x, target, reduction="none")
            before = incoming.clone()
            got = torch.autograd.grad(loss, x, incoming)[0]
            assert torch.equal(incoming.nan_to_num(), before.nan_to_num()), f"{name} was written"
            reference, wide = case.exact(x, target, reduction="none")
            want = torch.autograd.grad(reference, wide, incoming.double())[0]
            check(got, want, None, f"{case.name} {dtype} {name}")


# ---- autocast, no_grad, inference ----------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.torch], ids=lambda case: case.name)
def test_result_dtypes(case: Case) -> None:
    """torch's, for every pair of dtypes, with and without autocast."""
    assert case.torch is not None
    wrong = []
    for low, a, b in itertools.product((None, *HALF), DTYPES, DTYPES):
        x = torch.ones(3, 4, dtype=a)
        y = torch.full((3, 4), 0.25, dtype=b)
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            got, want = case.function(x, y).dtype, case.torch(x, y).dtype
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
        leaves = [t.detach().to(d).requires_grad_() for t, d in ((sample.input, a), (y, b))]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        for reduction in REDUCTIONS:
            got = case.function(*leaves, reduction=reduction)
            want = case.reference(*wide, reduction=reduction)
            label = f"{case.name} {a} {b} {reduction}"
            check(got, want, None, f"{label}: loss")
            grads = torch.autograd.grad(got.sum(), leaves)
            exact = torch.autograd.grad(want.sum(), wide)
            for name, mine, other in zip(("input", "target"), grads, exact, strict=True):
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


# ---- hints of the incoming gradient, few bits ----------------------------------------------------


@every_case
def test_right_hints_change_no_bit(case: Case) -> None:
    """The factor is applied in fp32 before the rounding, in forward or in backward."""
    for dtype, reduction in itertools.product(HALF, REDUCTIONS):
        for factor in (1.0, 3.0, -0.3, 1024.0):
            incoming = torch.tensor(factor)
            x, target = case.leaf(dtype)
            plain = case.function(x, target, reduction=reduction, loss_dtype=torch.float32)
            want = torch.autograd.grad(plain, x, incoming.expand_as(plain))[0]
            for hint in (incoming.item(), incoming, incoming.double()):
                loss = case.function(
                    x, target, reduction=reduction, loss_dtype=torch.float32, grad_scale=hint
                )
                got = torch.autograd.grad(loss, x, incoming.expand_as(loss))[0]
                assert torch.equal(loss, plain), (dtype, reduction, hint)
                assert torch.equal(got, want), (dtype, reduction, hint)


@every_case
def test_wrong_hints_cost_one_rounding(case: Case) -> None:
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        info = torch.finfo(dtype)
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        for hint, factor in itertools.product((4.0, torch.tensor(0.7), -3), (1.0, 0.3, -5.0)):
            x, target = case.leaf(dtype)
            loss = case.function(x, target, reduction=reduction, grad_scale=hint)
            assert torch.equal(loss, case.function(x, target, reduction=reduction))
            incoming = torch.full_like(loss, factor)
            got = torch.autograd.grad(loss, x, incoming)[0].double()
            reference, wide = case.exact(x, target, reduction=reduction)
            want = torch.autograd.grad(reference, wide, incoming.double())[0]
            # Two roundings to dtype; an underflow of the first is as large as factor / hint.
            underflow = max(abs(factor / float(hint)), 1) * info.tiny * info.eps
            bound = 0.5 * (spacing(want, dtype) + 1.01 * info.eps * want.abs() + underflow)
            bound += 2 * ARITHMETIC[compute] * torch.finfo(compute).eps * want.abs().max()
            label = f"{case.name} {dtype} {reduction} hint {hint}, factor {factor}"
            assert ((got - want).abs() <= bound).all(), label


@every_case
def test_a_hint_is_read_once(case: Case) -> None:
    """GradScaler changes its scale in place; a hint that changes after forward changes nothing."""
    for dtype in (torch.float32, torch.float16):
        x, target = case.leaf(dtype)
        want = torch.autograd.grad(case.function(x, target, loss_dtype=torch.float32) * 8, x)[0]
        hint = torch.tensor(8.0)
        loss = case.function(x, target, loss_dtype=torch.float32, grad_scale=hint)
        hint.mul_(2)
        assert torch.equal(torch.autograd.grad(loss * 8, x)[0], want), dtype


@every_case
def test_hints_that_cannot_be_undone(case: Case) -> None:
    """A gradient times 0, infinity or NaN is lost: such a hint is refused, or not used."""
    for dtype, hint in itertools.product((torch.float32, torch.bfloat16), (0.0, "inf", "nan")):
        x, target = case.leaf(dtype)
        (want,) = torch.autograd.grad(case.function(x, target), x)
        try:
            loss = case.function(x, target, grad_scale=float(hint))
        except ValueError as error:
            assert "grad_scale" in str(error)  # noqa: PT017 - one of two ways that are right
            continue
        (got,) = torch.autograd.grad(loss, x)
        assert torch.equal(got, want), f"{dtype}, hint {hint}"


def test_grad_scaler() -> None:
    """fp16, 32000 classes, scale 65536: error at most torch's, and only what must underflows."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(512, 32000, generator=random).mul_(4).half().requires_grad_()
    target = torch.randint(32000, (512,), generator=random)
    scale = torch.tensor(65536.0)
    grads = {}
    for name, function, options in (
        ("torch", F.cross_entropy, {}),
        ("mbkern", mbkern.functional.cross_entropy, {}),
        ("hint", mbkern.functional.cross_entropy, {"grad_scale": scale}),
    ):
        with torch.autocast("cpu", torch.float16):
            loss = function(logits, target, **options)
        assert loss.dtype is torch.float32
        (grads[name],) = torch.autograd.grad(loss * scale, logits)
    assert torch.equal(grads["mbkern"], grads["hint"])
    want = logits.detach().double().softmax(1)
    want[torch.arange(512), target] -= 1
    want *= 65536 / 512
    for rows in range(0, 512, 128):  # some of the rows, for the time that it takes
        block = slice(rows, rows + 16)
        check(grads["mbkern"][block], want[block], grads["torch"][block], f"rows from {rows}")
    # Half the smallest denormal is the largest number that rounds to 0.
    nothing = want.abs() <= 2.0**-25
    lost = grads["mbkern"] == 0
    assert 0 < nothing.double().mean() < 0.25, "the test is about small gradients"
    assert not (lost & (want.abs() > 2.0**-25 * (1 + 1e-5))).any()  # fp32 arithmetic
    (unscaled,) = torch.autograd.grad(mbkern.functional.cross_entropy(logits, target), logits)
    assert (unscaled == 0).double().mean() > 0.5, "without the scale most of it is lost"


def test_confident_logits() -> None:
    """No cancellation as p -> 1: loss log1p(R), gradient -R / (1 + R), R = sum of the others' exp.

    Bound of the relative error: the distances, up to 44, are rounded to fp32 (2^-24 * 32 = 1.9e-6),
    exp and the sums add a few eps: 3e-6 (for long rows, R is a sum of rounded terms of one sign).
    """
    random = torch.Generator().manual_seed(2)
    for columns in (2, 5, 40, 100, 1000, 5000):
        margins = torch.linspace(0, 40, 81)
        x = torch.randn(len(margins), columns, generator=random)
        target = torch.randint(columns, (len(margins),), generator=random)
        rows = torch.arange(len(margins))
        x[rows, target] = x.max(1).values + margins
        x.requires_grad_()
        loss = mbkern.functional.cross_entropy(x, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        distance = x.detach().double() - x.detach().double()[rows, target].unsqueeze(1)
        terms = distance.exp()
        terms[rows, target] = 0
        rest = terms.sum(1)
        for name, got, want in (
            ("loss", loss.detach(), torch.log1p(rest)),
            ("gradient", grad[rows, target], -rest / (1 + rest)),
        ):
            error = ((got.double() - want) / want).abs()
            where = f"{columns} classes, margin {margins[error.argmax()]}: {name}"
            assert error.max() <= 3e-6, f"{where} {error.max()}"


# ---- in place, and memory ------------------------------------------------------------------------


@every_case
def test_gradient_over_the_logits(case: Case) -> None:
    """The bits are those of the gradient out of place, in the input's own memory, in any layout."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        for hint, shape in itertools.product((None, 2.0), ((6, 70), (2, 300, 3))):
            x, target = case.leaf(dtype, shape)
            options = {"reduction": reduction, "grad_scale": hint}
            for logits in (x + 0, x.mT.contiguous().mT * 1):
                plain = case.function(logits, target, **options)
                (want,) = torch.autograd.grad(plain.sum() * 2, logits)
                version = logits._version
                loss = case.function(logits, target, **options, inplace=True)
                (grad,) = torch.autograd.grad(loss.sum() * 2, logits)
                label = f"{dtype} {reduction} hint {hint} {logits.stride()}"
                assert torch.equal(loss, plain), label
                assert torch.equal(grad, want), label
                assert grad.data_ptr() == logits.data_ptr(), label
                assert grad.stride() == logits.stride(), label
                assert logits._version > version, label


def test_through_a_model() -> None:
    """The usual place: logits of a linear layer, seen as rows."""
    case = CASES[0]
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 30)
    x, target = torch.randn(4, 5, 8), torch.randint(30, (20,))
    for inplace in (False, True):
        layer.zero_grad()
        logits = layer(x).view(-1, 30)  # a view, but not of a leaf
        case.function(logits, target, inplace=inplace).backward()
        if not inplace:
            want = [p.grad.clone() for p in layer.parameters()]
    for got, grad in zip((p.grad for p in layer.parameters()), want, strict=True):
        assert torch.equal(got, grad)


@every_case
def test_what_was_saved_earlier_is_missed(case: Case) -> None:
    """A node that saved the logits finds them changed, instead of computing with the gradient."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        x, target = case.leaf(dtype)
        logits = x.exp()  # saves its result
        loss = case.function(logits, target, reduction=reduction, inplace=True).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_case
def test_changed_logits_are_refused(case: Case) -> None:
    """Where backward needs the logits again, a change of them in between is an error."""
    for dtype in DTYPES:
        x, target = case.leaf(dtype)
        for inplace in (False, True):
            logits = x + 0
            loss = case.function(logits, target, reduction="none", inplace=inplace)
            with torch.no_grad():
                logits.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.sum().backward()


@every_case
def test_refused(case: Case) -> None:
    """Leaves that require grad, views of them, memory that elements share; nothing is written."""
    x, target = case.leaf(torch.float32)
    row = case.sample((1, 70), torch.float32).input.requires_grad_() + 0
    spread = case.sample((40,), torch.float32).input.requires_grad_() + 0
    refusals = {
        "leaf": (x, "leaf that requires grad"),
        "view of a leaf": (x.view(6, 70), "leaf that requires grad"),
        "slice of a leaf": (x[:, :], "leaf that requires grad"),
        "expanded": (row.expand(6, 70), "share memory"),
        "strided over itself": (spread.as_strided((6, 35), (1, 1)), "share memory"),
    }
    for name, (logits, message) in refusals.items():
        labels = (
            target[:, :35] if target.shape == (6, 70) and logits.shape[1] == 35 else target % 35
        )
        labels = labels if logits.shape[1] == 35 else target
        before, version = logits.detach().clone(), logits._version
        with pytest.raises((RuntimeError, ValueError), match=message):
            case.function(logits, labels, inplace=True)
        assert torch.equal(logits, before), name
        assert logits._version == version, name


@every_case
def test_refused_over_other_arguments(case: Case) -> None:
    memory = torch.rand(6, 70, requires_grad=True) + 0
    weight = memory.detach()[:, 0] if case.has_rows else memory.detach()
    with pytest.raises(ValueError, match="overlaps another argument"):
        case.function(memory, case.leaf(torch.float32)[1], sample_weight=weight, inplace=True)
    with pytest.raises(ValueError, match="overlaps another argument"):
        case.function(memory, memory.detach(), inplace=True)


PEAK = """
import os, resource, sys, torch
from mbkern import functional as F

N, V = 2048, 16384

class Same(torch.autograd.Function):  # a result that is no leaf, in the memory of its argument
    @staticmethod
    def forward(ctx, x):
        return torch.empty(0, dtype=x.dtype).set_(x.detach())
    @staticmethod
    def backward(ctx, grad):
        return None

def run(logits, target, reduction, inplace):
    logits.requires_grad_()
    logits = Same.apply(logits) if inplace else logits
    F.cross_entropy(logits, target, reduction=reduction, inplace=inplace).sum().backward()

def extra(dtype, reduction, inplace, layout):
    dtype, inplace = getattr(torch, dtype), inplace == "True"
    shape, memory = (N, V), torch.contiguous_format
    if layout == "images":
        shape, memory = (N // 64, V, 8, 8), torch.channels_last
    target = torch.randint(0, 5, shape[:1] + shape[2:])
    run(torch.zeros((2, 5, *shape[2:]), dtype=dtype), target[:2], reduction, inplace)  # first use
    logits = torch.empty(shape, dtype=dtype, memory_format=memory).fill_(0.5)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    run(logits, target, reduction, inplace)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before

for line in sys.argv[1:]:
    if not os.fork():  # a peak of its own, that starts at what is in use now
        print(extra(*line.split()), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_peak_memory() -> None:
    """The gradient (in place: nothing), two fp32 numbers a row, one fp32 row a thread; no copy."""
    calls = [
        ("float32", "mean", "False", "rows"),
        ("float32", "mean", "True", "rows"),
        ("bfloat16", "mean", "False", "rows"),
        ("float32", "none", "True", "rows"),
        ("float32", "mean", "False", "images"),
    ]
    command = [sys.executable, "-c", PEAK, *(" ".join(call) for call in calls)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows, columns, mib = 2048, 16384, 1 << 20
    for call, line in zip(calls, done.stdout.splitlines(), strict=True):
        dtype, _, inplace, _ = call
        gradient = 0 if inplace == "True" else rows * columns * getattr(torch, dtype).itemsize
        promised = gradient + 2 * 4 * rows + torch.get_num_threads() * 4 * columns
        # Stacks, page tables, the kernel's counters and first uses; a copy would be 64 MiB or more.
        assert int(line) <= promised + 6 * mib, f"{call}: {int(line) / mib:.1f} MiB"
        assert int(line) >= gradient - mib, f"{call}: the gradient is not in {int(line) / mib} MiB"
