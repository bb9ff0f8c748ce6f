"""Losses of two classes: probabilities, logits and scores, an element each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mbkern._losses import find
from mbkern.functional._ends import refuse_what_is_no_tensor, tensor_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mbkern.functional._ends import Extras

_BINARY_CROSS_ENTROPY = find("binary_cross_entropy")
_BINARY_CROSS_ENTROPY_WITH_LOGITS = find("binary_cross_entropy_with_logits")
_SIGMOID_FOCAL_LOSS = find("sigmoid_focal_loss")
_SOFT_MARGIN_LOSS = find("soft_margin_loss")
_HINGE_EMBEDDING_LOSS = find("hinge_embedding_loss")
_HINGE_LOSS = find("hinge_loss")
_SQUARED_HINGE_LOSS = find("squared_hinge_loss")
_MARGIN_RANKING_LOSS = find("margin_ranking_loss")


def _require_one_shape(name: str, input: Tensor, target: Tensor) -> None:
    try:
        same = input.shape == target.shape
    except AttributeError:
        same = False
    if not same:  # torch refuses it too
        refuse_what_is_no_tensor(find(name), input, target)
        raise ValueError(
            f"mbkern: {name} needs input and target of one shape, not {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """-(t log p + (1 - t) log(1 - p)): :func:`torch.nn.functional.binary_cross_entropy`.

    Args:
        input: probabilities p, in [0, 1]: ValueError otherwise; on CUDA NaN. Logarithms are at
            least -100, as in torch.
        target: t, of the same shape.
        weight: broadcasts to that shape, and does not count in the mean.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in both.
    """
    _require_one_shape("binary_cross_entropy", input, target)
    return tensor_loss(
        _BINARY_CROSS_ENTROPY, (input, target), reduction, extras, (), weight, size_average, reduce,
    )  # fmt: skip


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    **extras: Unpack[Extras],
) -> Tensor:
    """Binary cross-entropy of logits x: w t log(1 + e^-x) + (1 - t) log(1 + e^x).

    :func:`torch.nn.functional.binary_cross_entropy_with_logits`. No logarithm of a sum cancels, for
    any logit.

    Args:
        input: logits.
        target: t, of the same shape.
        weight: broadcasts to that shape, and does not count in the mean.
        pos_weight: w, of the positive class; broadcasts to that shape.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in input and target.
    """
    _require_one_shape("binary_cross_entropy_with_logits", input, target)
    return tensor_loss(
        _BINARY_CROSS_ENTROPY_WITH_LOGITS, (input, target, pos_weight), reduction, extras, (),
        weight, size_average, reduce,
    )  # fmt: skip


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    **extras: Unpack[Extras],
) -> Tensor:
    """Focal loss of logits (Lin et al. 2017): a (1 - p_t)^gamma times the binary cross-entropy.

    p_t is the probability of the target, a is alpha t + (1 - alpha) (1 - t), or 1 for a negative
    ``alpha``. Arguments and defaults of ``torchvision.ops.sigmoid_focal_loss``.

    Args:
        input, target: logits, and targets in [0, 1]; they broadcast to one shape.
        alpha: the weight of targets of 1, at most 1; negative for none.
        gamma: at least 0; 0 is binary cross-entropy.
        reduction: "none" (the default here), "mean" or "sum".
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in both.
    """
    parameters = _SIGMOID_FOCAL_LOSS.numbers(alpha=alpha, gamma=gamma)
    return tensor_loss(_SIGMOID_FOCAL_LOSS, (input, target), reduction, extras, parameters)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """log(1 + exp(-target input)), target 1 or -1: :func:`torch.nn.functional.soft_margin_loss`.

    Args:
        input, target: tensors that broadcast to one shape.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in ``input``; NotImplementedError for a target that requires grad.
    """
    return tensor_loss(
        _SOFT_MARGIN_LOSS, (input, target), reduction, extras, (), None, size_average, reduce
    )


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """The distance ``input`` where the target is 1, max(0, margin - input) where it is -1.

    :func:`torch.nn.functional.hinge_embedding_loss`.

    Args:
        input, target: tensors that broadcast to one shape.
        margin: from which on a distance is large enough.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in ``input``.
    """
    return tensor_loss(
        _HINGE_EMBEDDING_LOSS, (input, target), reduction, extras,
        _HINGE_EMBEDDING_LOSS.numbers(margin=margin), None, size_average, reduce,
    )  # fmt: skip


def hinge_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """max(0, margin - target input), target 1 or -1.

    Args:
        input, target: tensors that broadcast to one shape.
        margin: from which on an input counts nothing.
        reduction: "none", "mean" or "sum".
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in both.
    """
    return tensor_loss(
        _HINGE_LOSS, (input, target), reduction, extras, _HINGE_LOSS.numbers(margin=margin)
    )


def squared_hinge_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """max(0, margin - target input)^2, target 1 or -1. Arguments as in :func:`hinge_loss`."""
    return tensor_loss(
        _SQUARED_HINGE_LOSS,
        (input, target),
        reduction,
        extras,
        _SQUARED_HINGE_LOSS.numbers(margin=margin),
    )


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """max(0, -target (input1 - input2) + margin), target 1 or -1.

    :func:`torch.nn.functional.margin_ranking_loss`.

    Args:
        input1, input2, target: tensors that broadcast to one shape.
        margin: by how much the one that is to be larger must be.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in all three.
    """
    return tensor_loss(
        _MARGIN_RANKING_LOSS, (input1, input2, target), reduction, extras,
        _MARGIN_RANKING_LOSS.numbers(margin=margin), None, size_average, reduce,
    )  # fmt: skip
