"""All other losses, of elements and of rows, against torch's function or the usual chain."""

from __future__ import annotations

from functools import partial

from mbkern.bench import formulas
from mbkern.bench.formulas import Formula
from mbkern.bench.loss_ways import loss_problem
from mbkern.bench.models import DETECTION, IMAGENET, QWEN, RECOMMENDATION, TABULAR
from mbkern.bench.problem import Case, Plan

_AT = {
    "huber_loss": ("tabular", TABULAR),
    "quantile_loss": ("tabular", TABULAR),
    "binary_cross_entropy_with_logits": ("recommendation", RECOMMENDATION),
    "sigmoid_focal_loss": ("detection", DETECTION),
}
_SHORT_ELEMENTS = ("mse_loss", "huber_loss", "binary_cross_entropy_with_logits",
                   "sigmoid_focal_loss")  # fmt: skip
_SHORT_ROWS = ("nll_loss", "softmax_focal_loss", "kl_div_with_logits")


def pointwise(plan: Plan) -> list[Case]:
    """2^24 elements (2^20: short; 2^28 on a GPU), and sizes of tasks that use the loss."""
    size = 1 << (28 if plan.device == "cuda" else 20 if plan.short else 24)
    found = []
    for formula in formulas.ELEMENTS:
        if plan.short and formula.name not in _SHORT_ELEMENTS:
            continue
        for dtype in ("float32", "bfloat16"):
            if dtype == "bfloat16" and (plan.short or formula.name in formulas.ROUGH_IN_BF16):
                continue
            found.append(_case(plan, "pointwise", formula, "large", (size,), dtype))
        if formula.name in _AT:
            found.append(_case(plan, "pointwise", formula, *_AT[formula.name], "float32"))
    return [c for c in found if not plan.model or f" {plan.model} " in c.name]


def rows(plan: Plan) -> list[Case]:
    """Rows of ImageNet's classes, and of a vocabulary where the loss is one of language models."""
    found = []
    for formula in formulas.ROWS:
        if plan.short and formula.name not in _SHORT_ROWS:
            continue
        count = 512 if plan.short else 4096
        found.append(
            _case(plan, "rows", formula, IMAGENET.name, (count, IMAGENET.classes), "float32")
        )
        if formula.name.endswith("_with_logits") and not plan.short:
            found.append(_case(plan, "rows", formula, QWEN.name, (64, QWEN.classes), "float32"))
    return [c for c in found if not plan.model or f" {plan.model} " in c.name]


def _case(
    plan: Plan, suite: str, formula: Formula, what: str, shape: tuple[int, ...], dtype: str
) -> Case:
    build = partial(
        loss_problem, formula, shape, dtype,
        tiers=dtype == "float32" and not plan.short, compiled=True,
    )  # fmt: skip
    size, axis = (shape[0], "elements") if len(shape) == 1 else (shape[1], "classes")
    return Case(suite, f"{formula.name} {what} {shape}", shape, dtype, build, size, axis)
