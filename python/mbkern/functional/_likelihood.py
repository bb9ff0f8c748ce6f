"""Negative log-likelihoods and divergences of distributions given by an element each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mbkern._arguments import legacy_reduction, warn_of_mean
from mbkern._losses import find
from mbkern.functional._ends import refuse_what_is_no_tensor, tensor_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mbkern.functional._ends import Extras

_KL_DIV = find("kl_div")
_POISSON_NLL_LOSS = find("poisson_nll_loss")
_GAUSSIAN_NLL_LOSS = find("gaussian_nll_loss")
_TWEEDIE_NLL_LOSS = find("tweedie_nll_loss")


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    **extras: Unpack[Extras],
) -> Tensor:
    """Kullback-Leibler divergence, p (log p - input): :func:`torch.nn.functional.kl_div`.

    Args:
        input: log-probabilities.
        target: probabilities p, or log-probabilities with ``log_target``. It broadcasts.
        reduction: "none", "mean" (over all elements: with torch's warning that this is not the
            divergence), "sum", or "batchmean": the sum over the size of the first dimension, the
            mathematical divergence of a batch of rows.
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in both. From logits, in one pass: :func:`kl_div_with_logits`.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce, stacklevel=3)
    elif reduction == "mean" and extras.get("denominator") is None:
        warn_of_mean()
    if reduction == "batchmean":
        if extras.get("denominator") is not None:
            raise ValueError("mbkern: denominator goes with reduction='mean', not 'batchmean'")
        reduction = "mean"
        try:
            extras = {**extras, "denominator": float(input.shape[0]) if input.dim() else 1.0}
        except AttributeError:
            refuse_what_is_no_tensor(_KL_DIV, input, target)
            raise
    parameters = _KL_DIV.numbers(log_target=log_target)
    return tensor_loss(_KL_DIV, (input, target), reduction, extras, parameters)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """Negative log-likelihood of counts: exp(x) - t x, or x - t log(x + eps).

    :func:`torch.nn.functional.poisson_nll_loss`.

    Args:
        input: x, the logarithm of the rate, or the rate itself with ``log_input=False``.
        target: counts t.
        full: add Stirling's approximation of log t! where t > 1.
        eps: keeps log(x) finite.
        reduction: "none", "mean" or "sum".
        size_average, reduce: deprecated, as in torch.
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in both.
    """
    parameters = _POISSON_NLL_LOSS.numbers(log_input=log_input, full=full, eps=eps)
    return tensor_loss(
        _POISSON_NLL_LOSS, (input, target), reduction, extras, parameters, None, size_average,
        reduce,
    )  # fmt: skip


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """(log v + (input - target)^2 / v) / 2: :func:`torch.nn.functional.gaussian_nll_loss`.

    Args:
        input, target: means and observations.
        var: variances, v = max(var, eps); a number, or of a shape that broadcasts to the input's,
            or of that without its last dimension. Negative ones raise ValueError (on CUDA nobody
            looks). As in torch the gradient is that by v.
        full: add log(2 pi) / 2.
        eps: the smallest variance.
        reduction: "none", "mean" or "sum".
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in all three.
    """
    try:
        shape = input.shape
        if not isinstance(var, Tensor):
            var = _of_one_variance(var, input)
    except AttributeError:
        refuse_what_is_no_tensor(_GAUSSIAN_NLL_LOSS, input, target)
        raise
    if var.dim() and var.shape != shape:
        if var.shape == shape[:-1]:
            var = var.unsqueeze(-1)
        elif var.dim() > len(shape) or any(
            a not in (1, b) for a, b in zip(reversed(var.shape), reversed(shape), strict=False)
        ):
            refuse_what_is_no_tensor(_GAUSSIAN_NLL_LOSS, input, target)
            raise ValueError(
                f"mbkern: var has shape {tuple(var.shape)}, which does not broadcast to the "
                f"input's, {tuple(shape)}, nor is it that without its last dimension"
            )
    parameters = _GAUSSIAN_NLL_LOSS.numbers(full=full, eps=eps)
    return tensor_loss(_GAUSSIAN_NLL_LOSS, (input, target, var), reduction, extras, parameters)


def _of_one_variance(var: float, input: Tensor) -> Tensor:
    try:
        number = math.nan if isinstance(var, (bool, str)) else float(var)
    except (TypeError, ValueError):
        number = math.nan
    if number != number and not isinstance(var, float):
        raise TypeError(
            f"mbkern: gaussian_nll_loss: var must be a tensor or a number, not {type(var).__name__}"
        )
    if number < 0:
        raise ValueError("var has negative entry/entries")
    return torch.full((), number, dtype=input.dtype, device=input.device)


def tweedie_nll_loss(
    input: Tensor,
    target: Tensor,
    power: float = 1.5,
    log_input: bool = True,
    eps: float = 1e-8,
    reduction: str = "mean",
    **extras: Unpack[Extras],
) -> Tensor:
    """Negative log-likelihood of a Tweedie distribution, up to what depends on the target only.

    With the mean m: -t m^(1-p) / (1-p) + m^(2-p) / (2-p); Poisson for a power p of 1, gamma for 2,
    compound for 1 < p < 2 (insurance claims: many zeros, a long tail).

    Args:
        input: log m, or m itself with ``log_input=False``, at least ``eps``.
        target: t >= 0.
        power: p, 0 or at least 1.
        log_input: whether the input is log m.
        eps: the smallest m, without ``log_input``.
        reduction: "none", "mean" or "sum".
        extras: keywords of every loss, see ``help(mbkern.functional)``; an item is an element.

    Differentiable in both. Source: Jorgensen, The theory of dispersion models (1997).
    """
    parameters = _TWEEDIE_NLL_LOSS.numbers(power=power, log_input=log_input, eps=eps)
    return tensor_loss(_TWEEDIE_NLL_LOSS, (input, target), reduction, extras, parameters)
