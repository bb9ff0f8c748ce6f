"""Which loss a call of ``loss_and_grad`` asks for: by its name, and by options of another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from mbkern._linear_imperative import NAME as HEAD
from mbkern._losses import Loss, find, losses

#: The kernels divide by beta: beta = 0 is the loss that it tends to, without the weight of that.
_SMOOTH_L1_OF_ZERO = replace(find("l1_loss"), name="smooth_l1_loss", weight=None)
_NAMES = tuple(loss.name for loss in losses())


def asked_loss(name: Any, options: dict[str, Any]) -> Loss:
    """The loss of a name that is not the head's; what has chosen it is taken out of the options."""
    if not isinstance(name, str):
        raise TypeError(
            f"mbkern: the name of a loss comes first, then its tensors; not {type(name).__name__}"
        )
    if name not in _NAMES:
        raise ValueError(f"mbkern: unknown loss {name!r}; available: {', '.join([*_NAMES, HEAD])}")
    if name == "smooth_l1_loss" and _is_zero(options.get("beta")):
        del options["beta"]
        return _SMOOTH_L1_OF_ZERO
    return find(name)


def asked_reduction(loss: Loss, reduction: str, input: Tensor | None, options: Any) -> str:
    """The reduction; torch's "batchmean" of kl_div is a mean with a denominator of its own."""
    if loss.name != "kl_div" or reduction != "batchmean" or input is None:
        return reduction
    if options.get("denominator") is not None:
        raise ValueError("mbkern: denominator goes with reduction='mean', not 'batchmean'")
    options["denominator"] = float(input.shape[0]) if input.dim() else 1.0
    return "mean"


def _is_zero(beta: Any) -> bool:
    """As torch's function asks; what is no number is refused later, by name."""
    if isinstance(beta, (Tensor, str, bytes)):
        return False
    try:
        return float(beta) == 0
    except (TypeError, ValueError, OverflowError):
        return False
