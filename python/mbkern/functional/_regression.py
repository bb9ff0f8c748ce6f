"""Losses of real numbers against real numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mbkern._losses import Loss, find
from mbkern.functional._ends import refuse_weights, refuse_what_is_no_tensor, tensor_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mbkern.functional._ends import Extras

_MSE_LOSS = find("mse_loss")
_HALF_SQUARED_ERROR = find("half_squared_error")
_L1_LOSS = find("l1_loss")
_SMOOTH_L1_LOSS = find("smooth_l1_loss")
_HUBER_LOSS = find("huber_loss")
# Asked themselves, not by numbers(): torch's two losses take so little time that it shows.
_BETA, _DELTA = _SMOOTH_L1_LOSS.parameters["beta"], _HUBER_LOSS.parameters["delta"]
_LOG_COSH_LOSS = find("log_cosh_loss")
_QUANTILE_LOSS = find("quantile_loss")


def _require_shape(loss: Loss, weight: Tensor, input: Tensor) -> None:
    try:
        same = weight.shape == input.shape
    except AttributeError:
        same = False
    if not same:
        refuse_what_is_no_tensor(loss, input)
        refuse_weights(weight=weight)
        raise ValueError(
            f"mbkern: weight {tuple(weight.shape)} and input {tuple(input.shape)} must have "
            "the same shape"
        )


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    **extras: Unpack[Extras],
) -> Tensor:
    """Squared error (input - target)^2: :func:`torch.nn.functional.mse_loss`.

    Args:
        input, target: tensors that broadcast to one shape; both differentiable.
        weight: of the input's shape; ``mean`` divides by the sum of the weights.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.
    """
    if weight is not None:
        _require_shape(_MSE_LOSS, weight, input)
    return tensor_loss(
        _MSE_LOSS, (input, target), reduction, extras, (), weight, size_average, reduce
    )


def half_squared_error(
    input: Tensor, target: Tensor, reduction: str = "mean", **extras: Unpack[Extras]
) -> Tensor:
    """Half the squared error, (input - target)^2 / 2, whose gradient is the residual.

    Arguments as in :func:`mse_loss`.
    """
    return tensor_loss(_HALF_SQUARED_ERROR, (input, target), reduction, extras)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    **extras: Unpack[Extras],
) -> Tensor:
    """Absolute error |input - target|: :func:`torch.nn.functional.l1_loss`.

    Arguments as in :func:`mse_loss`. The gradient at 0 is 0.
    """
    if weight is not None:
        _require_shape(_L1_LOSS, weight, input)
    return tensor_loss(
        _L1_LOSS, (input, target), reduction, extras, (), weight, size_average, reduce
    )


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
    **extras: Unpack[Extras],
) -> Tensor:
    """With r = input - target, r^2 / (2 beta) where abs(r) < beta, else abs(r) - beta / 2.

    :func:`torch.nn.functional.smooth_l1_loss`; ``beta=0`` is :func:`l1_loss`. Other arguments as in
    :func:`mse_loss`.
    """
    is_l1 = not isinstance(beta, Tensor) and beta == 0
    loss = _L1_LOSS if is_l1 else _SMOOTH_L1_LOSS
    parameters = () if is_l1 else (_BETA.check("beta", beta),)
    return tensor_loss(
        loss, (input, target), reduction, extras, parameters, None, size_average, reduce
    )


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
    **extras: Unpack[Extras],
) -> Tensor:
    """With r = input - target, r^2 / 2 where abs(r) < delta, else delta (abs(r) - delta / 2).

    :func:`torch.nn.functional.huber_loss`. As there ``weight``, of the input's shape, does not
    count in the mean. Other arguments as in :func:`mse_loss`.
    """
    if weight is not None:
        _require_shape(_HUBER_LOSS, weight, input)
    parameters = (_DELTA.check("delta", delta),)
    return tensor_loss(_HUBER_LOSS, (input, target), reduction, extras, parameters, weight)


def log_cosh_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", **extras: Unpack[Extras]
) -> Tensor:
    """log(cosh(input - target)), whose gradient is tanh(input - target).

    Arguments as in :func:`mse_loss`.
    """
    return tensor_loss(_LOG_COSH_LOSS, (input, target), reduction, extras)


def quantile_loss(
    input: Tensor,
    target: Tensor,
    quantile: float = 0.5,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """Pinball loss: with r = target - input, q r where r >= 0, else (q - 1) r.

    Minimised by the ``quantile``, q in (0, 1), of the targets (Koenker & Bassett 1978). The
    gradient at 0 is 0. Other arguments as in :func:`mse_loss`.
    """
    parameters = _QUANTILE_LOSS.numbers(quantile=quantile)
    return tensor_loss(_QUANTILE_LOSS, (input, target), reduction, extras, parameters)
