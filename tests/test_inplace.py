"""The gradient over the logits: where it may be, who notices, and how much memory a call takes."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from cases import CASES, DTYPES, REDUCTIONS, Case

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
HALF = (torch.bfloat16, torch.float16)


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
        logits = x.sigmoid()  # saves its result
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
def test_a_gradient_that_was_overwritten_is_missed(case: Case) -> None:
    """It lies where the input was; whoever still takes that for the input must not go unnoticed."""
    for dtype, hint in ((torch.float32, None), (torch.bfloat16, 2.0), (torch.float64, None)):
        x, target = case.leaf(dtype)
        options = {"grad_scale": hint, "inplace": True}
        logits = x + 0
        loss = case.function(logits, target, **options)
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        plain = case.function(x, target, grad_scale=hint)
        assert torch.equal(first, torch.autograd.grad(plain, x)[0])
        with torch.no_grad():
            logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, logits)
        if case.name == "binary_cross_entropy":  # which refuses the gradient as a probability
            continue
        logits = x + 0
        twice = case.function(logits, target, **options) + case.function(logits, target, **options)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            twice.backward()


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


@pytest.mark.parametrize("way", ["split", "chunk", "unbind"])
@every_case
def test_views_that_torch_lets_nobody_write_to(case: Case, way: str) -> None:
    """Refused before anything is written; slices of the same memory are not."""
    x, target = case.leaf(torch.float32, (12, 5))
    logits = x * 1
    before, labels = logits.detach().clone(), target[:6]
    parts = {
        "split": lambda: logits.split(6),
        "chunk": lambda: logits.chunk(2),
        "unbind": lambda: logits.view(2, 6, 5).unbind(0),
    }[way]()
    with pytest.raises(RuntimeError, match=r"overwrite a view .*MULTI_OUTPUT_NODE"):
        case.function(parts[0], labels, inplace=True)
    assert torch.equal(logits.detach(), before)
    case.function(logits[:6], labels, inplace=True)
