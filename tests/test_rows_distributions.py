"""Losses of a softmax's rows where it is extreme, and distances of distributions near and far."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, check
from row_case import RowCase, RowSample
from row_cases import ROW_CASES
from row_results import compare, differentiate

import mbkern

pytestmark = pytest.mark.usefixtures("one_thread")
DISTANCES = [case for case in ROW_CASES if case.inputs == ("student", "teacher")]
SOFTMAXES = [case for case in ROW_CASES if any("temperature" in v.options for v in case.variations)]


@pytest.mark.parametrize("case", SOFTMAXES, ids=lambda case: case.name)
def test_extreme_logits(case: RowCase, isa: str) -> None:
    """Huge logits are like any others; NaN and +inf make their item NaN, and -inf is no class."""
    for columns, dtype in itertools.product((5, 70), DTYPES):
        sample = case.sample((8, columns), dtype, seed=1)
        for value, name in itertools.product(
            (float("nan"), float("inf"), 1e30, -1e30, 88.0, -2e4), case.inputs
        ):
            odd = sample.tensors[name].clone()
            odd[::2, 3] = value
            odd[1] = value
            infinite = not torch.isfinite(torch.tensor(value, dtype=dtype))
            for k in () if infinite else (0, 1, 3):  # a huge row must not hide the others
                part = sample.of(**{name: odd}).part(slice(k, k + 1))
                label = f"{value} in {name}, row {k}"
                compare(case, part, case.variations[0], label, reductions=("none",))
            if infinite and value != -1e30:  # which is -inf in fp16, and no class
                loss = case.function(**sample.of(**{name: odd}).tensors, reduction="none")
                want = torch.tensor([True, True, *[True, False] * 3])
                assert torch.equal(loss.isnan(), want), f"{case.name} {dtype} {value} {name} {loss}"


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_identical_distributions(case: RowCase, isa: str) -> None:
    """The distance is 0, and so are the gradients, exactly."""
    for dtype, columns, variation in itertools.product(DTYPES, (1, 5, 70, 1100), case.variations):
        sample = case.sample((6, columns), dtype, variation)
        scale = torch.tensor([0.1, 1, 5, 10, 30, 100], dtype=dtype).unsqueeze(-1)
        same = sample.tensors["student"] * scale
        if "denominator" in variation.options:
            continue
        both = sample.of(student=same, teacher=same)
        got = differentiate(case.function, case, both, "none")
        for result in got:
            assert result is not None
            zero = result.double().abs().max()
            assert zero == 0, f"{case.name} {variation.name} {dtype} {columns}: {zero}"


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_near_distributions(case: RowCase, isa: str) -> None:
    """Small distances are right in all their digits: the terms are not negative."""
    random = torch.Generator().manual_seed(4)
    for columns, step in itertools.product((3, 70, 1100), (1e-2, 1e-3)):
        student = torch.randn(5, columns, generator=random)
        teacher = student + step * torch.randn(5, columns, generator=random)
        got = case.function(student, teacher, reduction="none")
        want = case.reference(student=student.double(), teacher=teacher.double(), reduction="none")
        # The logarithm of a ratio, some step, is rounded like numbers of 1, and enters squared.
        tolerance = 16 * torch.finfo(torch.float32).eps / step
        assert ((got - want) / want).abs().max() <= tolerance, f"{columns} {step}"


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_one_class_is_nearly_certain_on_both_sides(case: RowCase, isa: str) -> None:
    """p - t of that class is a small difference of large numbers, and as exact as the others.

    Their exponents, of up to 25, are rounded to 1e-6, and their terms may cancel a little.
    """
    for margin, columns, variation in itertools.product(
        (8.0, 16.0, 20.0), (7, 1500), case.variations
    ):
        made = case.sample((5, columns), torch.float32, variation, seed=int(margin))
        scale = made.options.get("temperature", 1.0)
        reduction = "mean" if "denominator" in made.options else "none"
        both = {n: made.tensors[n].clone() for n in case.inputs}
        for t in both.values():
            t[:, 3] = t.amax() + margin * scale
        results = []
        for function, dtype in ((case.function, torch.float32), (case.reference, torch.float64)):
            sample, leaves = case.leaves(made.of(**both).to(dtype))
            loss = function(**sample.tensors, **sample.options, reduction=reduction)
            results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
        for got, want in zip(*results, strict=True):
            error, size = (got - want).abs(), want.abs()
            if want.dim() > 1:
                error, size = error.amax(1), size.amax(1)
            assert (error <= 2e-5 * size + 1e-14).all(), (margin, columns, variation)


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_one_hot_distributions(case: RowCase, isa: str) -> None:
    """Masked logits on both sides, and distributions with one class each."""
    inf = float("inf")
    for dtype in DTYPES:
        student = torch.tensor([[0.0, 1, -inf], [80, 0, 0], [1, -inf, -inf]], dtype=dtype)
        teacher = torch.tensor([[1.0, 0, -inf], [0, 80, 0], [2, -inf, -inf]], dtype=dtype)
        loss, *grads = differentiate(
            case.function, case, RowSample({"student": student, "teacher": teacher}, {}), "none"
        )
        first = [t[:1, :2].double() for t in (student, teacher)]
        want = case.reference(student=first[0], teacher=first[1], reduction="none")
        assert loss is not None
        assert abs(loss[0] - want[0]) <= 8 * torch.finfo(dtype).eps
        most = {"kl_div_with_logits": 80.0, "js_div_with_logits": 0.6931471805599453}
        assert abs(loss[1] - most.get(case.name, 1.0)) <= 8 * torch.finfo(dtype).eps * 80
        assert loss[2] == 0
        for grad in grads:
            assert grad is not None
            assert grad.isfinite().all(), grad
            assert (grad[2] == 0).all()
            assert grad[0, 2] == 0


@pytest.mark.parametrize("case", DISTANCES, ids=lambda case: case.name)
def test_far_distributions(case: RowCase, isa: str) -> None:
    """Logits apart by more than the digits of a probability."""
    for dtype, factor in itertools.product(DTYPES, (8.0, 15.0, 30.0)):
        sample = case.sample((6, 40), torch.float64, seed=2)
        both = {n: (t / 2 * factor) for n, t in sample.tensors.items()}
        far = sample.of(**both).to(dtype)
        compare(case, far, case.variations[0], f"times {factor}")


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e2, 1e4, 1e30])
def test_distributions_apart(offset: float) -> None:
    """Of logits that are all larger on one side the divergence is as exact as torch's."""
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 50, generator=random) for _ in range(2))
    teacher = teacher + offset if offset < 1e30 else torch.where(teacher > 2, offset, -offset)
    results = []
    for dtype in (torch.float64, torch.float32):
        x, y = (t.to(dtype, copy=True).requires_grad_() for t in (student, teacher))
        log_p, log_t = x.log_softmax(-1), y.log_softmax(-1)
        loss = F.kl_div(log_p, log_t, log_target=True, reduction="none").sum(-1)
        loss.sum().backward()
        results.append([loss.detach(), x.grad, y.grad])
    loss, grads = mbkern.loss_and_grad(
        "kl_div_with_logits", student, teacher, argnums=(0, 1), reduction="none"
    )
    for got, want, stock in zip((loss, *grads), *results, strict=True):
        # Where the teacher has one class only, its gradient is a logarithm of up to 7 less itself.
        bound = stock if offset < 1e30 else None
        check(got, want, bound, f"offset {offset}", magnitude=7.0 if bound is None else 1.0)


def test_sharp_focal_rows(isa: str) -> None:
    """Sure rows: the focal loss and its gradient are 0, not NaN, and entropy is."""
    for dtype, gamma in itertools.product(DTYPES, (0.0, 0.5, 1.0, 2.0, 3.5)):
        x = torch.tensor([[0.0, 3e4, 0], [3e4, 0, 0]], dtype=dtype).requires_grad_()
        target = torch.tensor([1, 1])
        loss = mbkern.functional.softmax_focal_loss(x, target, gamma, reduction="none")
        loss.backward(torch.ones_like(loss))
        assert x.grad is not None
        assert loss[0] == 0
        assert loss[1] == torch.tensor(3e4, dtype=dtype)
        assert torch.equal(x.grad[0], torch.zeros(3, dtype=dtype))
        assert torch.equal(x.grad[1], torch.tensor([1.0, -1, 0], dtype=dtype))
        x.grad = None
        mbkern.functional.entropy_with_logits(x, reduction="sum").backward()
        assert torch.equal(x.grad, torch.zeros(2, 3, dtype=dtype))
