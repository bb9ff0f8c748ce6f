"""Cross-entropy at the sizes of real models: torch, mbkern, peers, and the limits."""

from __future__ import annotations

from functools import partial

from mbkern.bench.formulas import CROSS_ENTROPY
from mbkern.bench.loss_ways import loss_problem
from mbkern.bench.models import GEMMA, GPT2, IMAGENET, LLAMA_8B, QWEN, SEGMENTATION
from mbkern.bench.problem import Case, Plan

SUITE = "cross_entropy"


def cases(plan: Plan) -> list[Case]:
    """As many rows as give 2^24 logits on a CPU (2^22: short), 2^28 on a GPU."""
    budget = 1 << (28 if plan.device == "cuda" else 22 if plan.short else 24)
    sizes: list[tuple[str, tuple[int, ...]]] = [
        (m.name, (max(1, budget // m.classes), m.classes))
        for m in (IMAGENET, GPT2, LLAMA_8B, QWEN, GEMMA)
    ]
    images = SEGMENTATION if not plan.short else (2, *SEGMENTATION[1:])
    sizes.append(("segmentation", images))
    found = []
    for model, shape in sizes:
        if plan.model and plan.model != model:
            continue
        for dtype in ("float32", "bfloat16"):
            if plan.short and (model, dtype) not in _SHORT:
                continue
            for direction in ("both", "forward", "backward"):
                if direction != "both" and plan.short and model != GPT2.name:
                    continue
                build = partial(
                    loss_problem, CROSS_ENTROPY, shape, dtype, direction=direction,
                    tiers=dtype == "float32", compiled=True,
                )  # fmt: skip
                found.append(
                    Case(SUITE, f"{model} {shape}", shape, dtype, build, shape[1], "classes",
                         direction)
                )  # fmt: skip
    return found


_SHORT = {
    (IMAGENET.name, "float32"), (GPT2.name, "float32"), (LLAMA_8B.name, "bfloat16"),
    ("segmentation", "float32"),
}  # fmt: skip
