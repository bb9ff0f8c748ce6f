"""Distances of the distributions that rows of logits stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mbkern._losses import find
from mbkern.functional._ends import rows_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mbkern.functional._ends import Extras

_KL = find("kl_div_with_logits")
_JS = find("js_div_with_logits")
_TV = find("tv_distance_with_logits")
_ENTROPY = find("entropy_with_logits")


def kl_div_with_logits(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
    reduction: str = "mean",
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    **extras: Unpack[Extras],
) -> Tensor:
    """Kullback-Leibler divergence of softmax(logits / temperature), one an item.

    Args:
        student, teacher: logits, (C), (N, C) or (N, C, d1, ...).
        temperature: positive. Hinton et al. (2015) multiply the loss by its square, so that
            gradients keep their size; that is left to the caller.
        direction: "forward", KL(teacher || student), or "reverse", KL(student || teacher).
        reduction: "none", "mean" (over items: torch's "batchmean") or "sum".
        target: class indices an item, as of the loss beside this one. Items whose index is
            ``ignore_index`` count nothing, and their gradient is 0; that is all they are used for.
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    Differentiable in both, each gradient computed only where it is asked for. Every term is formed
    as a number that is not negative, so that small divergences are right.
    """
    parameters = _KL.numbers(temperature=temperature, direction=direction)
    return rows_loss(
        _KL, (student, teacher), target, reduction, extras, parameters, None, ignore_index
    )


def js_div_with_logits(
    student: Tensor,
    teacher: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    **extras: Unpack[Extras],
) -> Tensor:
    """Generalised Jensen-Shannon divergence of softmax(logits / temperature), one an item.

    With m = beta t + (1 - beta) s it is beta KL(t || m) + (1 - beta) KL(s || m), where t is the
    teacher's and s the student's distribution. ``beta`` in [0, 1]; other arguments as in
    :func:`kl_div_with_logits`.
    """
    parameters = _JS.numbers(temperature=temperature, beta=beta)
    return rows_loss(
        _JS, (student, teacher), target, reduction, extras, parameters, None, ignore_index
    )


def tv_distance_with_logits(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: str = "mean",
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    **extras: Unpack[Extras],
) -> Tensor:
    """Total variation, half the sum of abs(s - t), of softmax(logits / temperature), one an item.

    Arguments as in :func:`kl_div_with_logits`. Where both are equal the subgradient is 0.
    """
    parameters = _TV.numbers(temperature=temperature)
    return rows_loss(
        _TV, (student, teacher), target, reduction, extras, parameters, None, ignore_index
    )


def entropy_with_logits(
    input: Tensor,
    temperature: float = 1.0,
    reduction: str = "mean",
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    **extras: Unpack[Extras],
) -> Tensor:
    """Entropy, minus the sum of p log p, of p = softmax(input / temperature), one an item.

    Arguments as in :func:`kl_div_with_logits`.
    """
    parameters = _ENTROPY.numbers(temperature=temperature)
    return rows_loss(_ENTROPY, (input,), target, reduction, extras, parameters, None, ignore_index)
