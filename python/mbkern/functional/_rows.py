"""Losses of which an item is a row of each of the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mbkern._losses import find
from mbkern.functional._ends import refuse_what_is_no_tensor, rows_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mbkern.functional._ends import Extras

_NLL_LOSS = find("nll_loss")
_MULTI_MARGIN_LOSS = find("multi_margin_loss")
_MULTILABEL_MARGIN_LOSS = find("multilabel_margin_loss")
_MULTILABEL_SOFT_MARGIN_LOSS = find("multilabel_soft_margin_loss")
_COSINE_EMBEDDING_LOSS = find("cosine_embedding_loss")
_TRIPLET_MARGIN_LOSS = find("triplet_margin_loss")
_DICE_LOSS = find("dice_loss")
_SOFTMAX_FOCAL_LOSS = find("softmax_focal_loss")


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """-weight[target] input[target] of log-probabilities: :func:`torch.nn.functional.nll_loss`.

    Args:
        input: log-probabilities, (C), (N, C) or (N, C, d1, ...).
        target: class indices, () or (N) or (N, d1, ...), of any integer dtype.
        weight: one weight a class; the mean divides by the sum of those of the targets.
        ignore_index: items with this class index count nothing, and their gradient is 0.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    From logits, in one pass: :func:`cross_entropy`.
    """
    return rows_loss(
        _NLL_LOSS, (input,), target, reduction, extras, (), weight, ignore_index, size_average,
        reduce,
    )  # fmt: skip


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """w_t / C times the sum over j != t of max(0, margin - x_t + x_j)^p, for the class t.

    :func:`torch.nn.functional.multi_margin_loss`.

    Args:
        input: scores x, (C) or (N, C).
        target: class indices, () or (N).
        p: 1 or 2.
        margin: by how much the target's score is to be the largest.
        weight: one weight w a class; it does not count in the mean.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``.
    """
    parameters = _MULTI_MARGIN_LOSS.numbers(p=p, margin=margin)
    return rows_loss(
        _MULTI_MARGIN_LOSS, (input,), target, reduction, extras, parameters, weight, None,
        size_average, reduce,
    )  # fmt: skip


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """Sum over classes t of an item and others j of max(0, 1 - (x_t - x_j)), over C.

    :func:`torch.nn.functional.multilabel_margin_loss`.

    Args:
        input: scores x, (C) or (N, C).
        target: of the same shape: the item's classes, up to the first -1.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``.
    """
    return rows_loss(
        _MULTILABEL_MARGIN_LOSS, (input,), target, reduction, extras, (), None, None, size_average,
        reduce,
    )  # fmt: skip


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """Mean over classes of the binary cross-entropy of logits, one loss an item.

    :func:`torch.nn.functional.multilabel_soft_margin_loss`.

    Args:
        input: logits, (C) or (N, C).
        target: of the same shape, in [0, 1].
        weight: one weight a class.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    Differentiable in both.
    """
    return rows_loss(
        _MULTILABEL_SOFT_MARGIN_LOSS, (input, target), None, reduction, extras, (), weight, None,
        size_average, reduce,
    )  # fmt: skip


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """1 - cos of two rows where the target is 1, max(0, cos - margin) where it is -1.

    :func:`torch.nn.functional.cosine_embedding_loss`.

    Args:
        input1, input2: (D) or (N, D).
        target: () or (N); other values give 0.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    Differentiable in both inputs.
    """
    try:
        if not (target.is_floating_point() or target.is_complex()):
            target = target.to(input1.dtype)
    except (AttributeError, TypeError):
        refuse_what_is_no_tensor(_COSINE_EMBEDDING_LOSS, input1, input2, target)
        raise
    parameters = _COSINE_EMBEDDING_LOSS.numbers(margin=margin)
    return rows_loss(
        _COSINE_EMBEDDING_LOSS, (input1, input2), target, reduction, extras, parameters, None, None,
        size_average, reduce,
    )  # fmt: skip


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """max(0, margin + d(anchor, positive) - d(anchor, negative)).

    :func:`torch.nn.functional.triplet_margin_loss`.

    Args:
        anchor, positive, negative: (D) or (N, D).
        margin: positive.
        p, eps: of the norm d(x, y) = norm(x - y + eps). Only p = 2 here; ValueError for others,
            which torch's function has.
        swap: use d(positive, negative) where it is smaller than d(anchor, negative).
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    Differentiable in all three.
    """
    if p != 2:
        raise ValueError(f"mbkern: triplet_margin_loss has p = 2 only, not {p}; torch's has others")
    parameters = _TRIPLET_MARGIN_LOSS.numbers(margin=margin, eps=eps, swap=swap)
    return rows_loss(
        _TRIPLET_MARGIN_LOSS, (anchor, positive, negative), None, reduction, extras, parameters,
        None, None, size_average, reduce,
    )  # fmt: skip


#: Torch's own: the distance is the caller's function.
triplet_margin_with_distance_loss = torch_functional.triplet_margin_with_distance_loss


def dice_loss(
    input: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth), one loss an item.

    Args:
        input: probabilities p, (N, D); more dimensions are joined: the sums of an item are over all
            its elements.
        target: t, of the same shape.
        smooth: keeps the quotient finite, at least 0.
        reduction: "none", "mean" or "sum".
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    Differentiable in both. Source: Milletari, Navab & Ahmadi, V-Net (2016), with sums for squares.
    """
    try:
        if input.dim() > 2 and target.shape == input.shape:  # as Loss.flattens says
            input, target = input.flatten(1), target.flatten(1)
    except AttributeError:
        refuse_what_is_no_tensor(_DICE_LOSS, input, target)
        raise
    return rows_loss(
        _DICE_LOSS, (input, target), None, reduction, extras, _DICE_LOSS.numbers(smooth=smooth)
    )


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float = 1.0,
    **extras: Unpack[Extras],
) -> Tensor:
    """Focal loss of several classes, -w_t (1 - p_t)^gamma log p_t with p = softmax(input / T).

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...).
        target: class indices t, of any integer dtype.
        gamma: at least 0; 0 is cross-entropy.
        weight: one weight w a class; the mean divides by the sum of those of the targets.
        ignore_index: items with this class index count nothing, and their gradient is 0.
        reduction: "none", "mean" or "sum".
        temperature: T, positive.
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    1 - p_t is the sum of the other terms over the whole, without cancellation. Source: Lin et al.,
    Focal loss for dense object detection (2017).
    """
    parameters = _SOFTMAX_FOCAL_LOSS.numbers(gamma=gamma, temperature=temperature)
    return rows_loss(
        _SOFTMAX_FOCAL_LOSS, (input,), target, reduction, extras, parameters, weight, ignore_index
    )


def info_nce_loss(
    similarity: Tensor,
    target: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """Cross-entropy of each row of a similarity matrix against its match.

    Args:
        similarity: (N, M), of N queries with M keys.
        target: (N), the key that belongs to each query; by default key i to query i.
        temperature: what the similarities are divided by, positive.
        reduction: "none", "mean" or "sum".
        extras: keywords of every loss, see ``help(mbkern.functional)``.

    The other direction is that of ``similarity.T``. Source: van den Oord, Li & Vinyals,
    Representation learning with contrastive predictive coding (2018).
    """
    try:
        is_matrix = similarity.dim() == 2
    except AttributeError:
        raise TypeError(
            f"mbkern: similarity must be a tensor, not {type(similarity).__name__}"
        ) from None
    if not is_matrix:
        raise ValueError(f"mbkern: similarity must be (N, M), not {tuple(similarity.shape)}")
    if target is None:
        if similarity.shape[1] < similarity.shape[0]:
            raise ValueError(
                f"mbkern: {similarity.shape[0]} queries have only {similarity.shape[1]} keys; pass "
                "target"
            )
        target = torch.arange(similarity.shape[0], device=similarity.device)
    parameters = _SOFTMAX_FOCAL_LOSS.numbers(gamma=0.0, temperature=temperature)
    try:
        return rows_loss(
            _SOFTMAX_FOCAL_LOSS, (similarity,), target, reduction, extras, parameters, None, None,
        )  # fmt: skip
    except TypeError:
        if not isinstance(target, Tensor):
            raise TypeError(
                f"mbkern: info_nce_loss: target must be a tensor, not {type(target).__name__}"
            ) from None
        raise
