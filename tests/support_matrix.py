"""Writes docs/support.md from the losses and the settings: python tests/support_matrix.py"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from settings import SETTINGS, Setting

import mbkern

PATH = Path(__file__).resolve().parents[1] / "docs" / "support.md"

HEAD = """# Where the losses work

Made by `python tests/support_matrix.py` from `mbkern.losses()` and the list of tested settings.

## The losses

All take float32, bfloat16, float16 and float64, on CPU and CUDA; `sample_weight`, `denominator`,
`inplace`, `grad_scale`, `loss_dtype`; and accumulate through `mbkern.loss_and_grad`. "torch": what
`mbkern.patched()` runs here where the call means exactly the same.
"""
ITEMS = {
    "row": "row",
    "pointwise": "element",
    "multirow": "row of each tensor",
}
WEIGHTS = {
    None: "",
    "classes": "of classes",
    "mean": "of elements, counted in the mean",
    "rescale": "of elements, not counted in the mean",
}
OTHERS = """
`info_nce_loss` is `softmax_focal_loss` with the matching keys as classes. What stays torch's:
`ctc_loss`, `AdaptiveLogSoftmaxWithLoss`, `triplet_margin_with_distance_loss` (offered under its
name: the distance is the caller's function), `triplet_margin_loss` with a norm other than 2; and,
inside `patched()`, complex and integer inputs, targets of another dtype or shape than the input,
weights that require grad, and losses of rows of more than two dimensions but `nll_loss`. Called as
`mbkern.functional`, complex and integer inputs are refused, and so are losses of rows whose tensors
would be broadcast, or are 0-dim: torch computes them.

Where results differ from torch's on purpose: two inputs of different dtypes give the promoted
dtype, whichever comes first; `gaussian_nll_loss` and `multilabel_soft_margin_loss` give float32
under autocast, as all others (torch's stay in 16 bits, on some devices, and so under `patched()`);
`binary_cross_entropy` raises ValueError for what is no probability, on CUDA it is NaN; its gradient
by the target at p = 0 or 1 is that of the loss, 100 or -100, and not infinite; the gradient of
`poisson_nll_loss(full=True)` by a target of 0 is finite.
"""
SETTINGS_HEAD = """
## Settings

Every line is a test (`tests/test_settings.py`) of `cross_entropy` and of every loss of elements in
float32, bfloat16, float16 and float64, but for Inductor's two lines: those in float32, and in the
other dtypes for `cross_entropy`, `mse_loss` and `half_squared_error`. `make test` tries these three
everywhere but in AOTInductor, and each other loss in every seventh line, in float32; `make slow`
tries the rest.
Losses of rows of several tensors have a shorter list, `tests/test_rows_settings.py`: derivatives,
autocast, torch.compile, vmap and grad, tensors without memory.

The result is torch's to rounding (where torch has no such function: its formula's), with torch's
dtype. "Same bits": and it has the bits of a plain call. Refused: an error with the reason, before
anything is read or written. "torch": the oldest version, of 2.6, 2.13 and 2.14, that does this;
`mbkern.patched()` reaches compiled calls from 2.13 on. `make torches` runs the tests with the
oldest and the newest.

As in torch, losses that are linear in the input have no second derivative to ask autograd for:
`quantile_loss`, `hinge_loss`, `hinge_embedding_loss`, `margin_ranking_loss`, `kl_div`. An incoming
gradient that is not finite gives NaN where the derivative is 0, though torch masks some of these to
0; and infinity where torch's formula subtracts infinities, which makes NaN.
"""


def _cell(setting: Setting) -> str:
    if setting.refusal:
        return "refused"
    return "same bits" if setting.exact else "yes"


def _losses() -> list[str]:
    lines = ["| loss | torch | an item is | gradients for | parameters | `weight` |"]
    lines += ["| --- |" + " --- |" * 5]
    for loss in mbkern.losses():
        torch_has = "yes" if hasattr(F, loss.name) else ""
        gradients = ", ".join(loss.differentiable)
        if loss.name == "cross_entropy":
            gradients += ", class probabilities"
        cells = (
            f"`{loss.name}`", torch_has, ITEMS[loss.kind], gradients, ", ".join(loss.parameters),
            WEIGHTS[loss.weight],
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text() -> str:
    """The page."""
    lines = [HEAD, *_losses(), OTHERS, SETTINGS_HEAD]
    for group in dict.fromkeys(setting.group for setting in SETTINGS):
        members = [setting for setting in SETTINGS if setting.group == group]
        lines += [f"### {group}", "", "| setting | losses | torch | |", "| --- | --- | --- | --- |"]
        for setting in members:
            lines.append(
                f"| {setting.name} | {_cell(setting)} | {setting.since} | {setting.note} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PATH.write_text(text())
