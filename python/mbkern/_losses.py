"""The registry of losses: what each is called, takes, and can do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mbkern import _C

_TWO = ("input", "target")


@dataclass(frozen=True)
class Parameter:
    """A number that a loss takes by name: its default, and what it may be."""

    default: float | bool
    least: float = -math.inf
    most: float = math.inf
    open: bool = False  # whether the ends are left out

    def check(self, name: str, value: Any) -> float:
        """Return a value as a number, or raise."""
        if isinstance(value, Tensor):
            raise TypeError(
                f"mbkern: {name} must be a number, not a tensor, of which no gradient is computed"
            )
        number = float(value)
        inside = self.least < number < self.most if self.open else self.least <= number <= self.most
        if not inside and not (self.open and number == math.inf == self.most):
            left, right = "()" if self.open else "[]"
            raise ValueError(
                f"mbkern: {name} must be in {left}{self.least}, {self.most}{right}, not {value}"
            )
        return number


@dataclass(frozen=True, eq=False)
class Loss:
    """One loss.

    Attributes:
        name: as in ``mbkern.functional`` and ``mbkern.loss_and_grad``.
        kind: "row" (softmax cross-entropy: an item is a row of classes) or "pointwise" (an item is
            an element).
        arguments: its tensors, in order.
        differentiable: those of them that gradients are computed for.
        parameters: the numbers it takes by name; the order is the kernels'.
        weight: what torch's ``weight`` is here: "classes"; "mean" (of an element, and ``mean``
            divides by the sum of the weights); "rescale" (of an element, not counted in the mean);
            or None, without one.
        number: its position in the compiled list of its kind.
    """

    name: str
    kind: str
    arguments: tuple[str, ...] = _TWO
    differentiable: tuple[str, ...] = _TWO
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    weight: str | None = None
    number: int = -1

    def numbers(self, **values: Any) -> tuple[float, ...]:
        """The parameters as the kernels take them, checked; absent ones have their default."""
        return tuple(
            parameter.check(name, values.get(name, parameter.default))
            for name, parameter in self.parameters.items()
        )


def _loss(name: str, kind: str = "pointwise", **properties: Any) -> Loss:
    numbers = _C.row_losses() if kind == "row" else _C.pointwise_losses()
    return Loss(name, kind, number=numbers.index(name), **properties)


_ONE = ("input",)
_MARGIN = {"margin": Parameter(1.0)}
_LOSSES = {
    loss.name: loss
    for loss in (
        _loss("cross_entropy", "row", differentiable=_ONE, weight="classes"),
        _loss("half_squared_error"),
        _loss("mse_loss", weight="mean"),
        _loss("l1_loss", weight="mean"),
        _loss("smooth_l1_loss", parameters={"beta": Parameter(1.0, 0.0, open=True)}),
        _loss("huber_loss", parameters={"delta": Parameter(1.0, 0.0, open=True)}, weight="rescale"),
        _loss("log_cosh_loss"),
        _loss("quantile_loss", parameters={"quantile": Parameter(0.5, 0.0, 1.0, open=True)}),
        _loss("binary_cross_entropy", weight="rescale"),
        _loss(
            "binary_cross_entropy_with_logits",
            arguments=("input", "target", "pos_weight"),
            weight="rescale",
        ),
        _loss(
            "sigmoid_focal_loss",
            parameters={"alpha": Parameter(0.25, most=1.0), "gamma": Parameter(2.0, 0.0)},
        ),
        _loss("soft_margin_loss", differentiable=_ONE),
        _loss("hinge_embedding_loss", differentiable=_ONE, parameters=_MARGIN),
        _loss("hinge_loss", parameters=_MARGIN),
        _loss("squared_hinge_loss", parameters=_MARGIN),
        _loss(
            "margin_ranking_loss",
            arguments=("input1", "input2", "target"),
            differentiable=("input1", "input2", "target"),
            parameters={"margin": Parameter(0.0)},
        ),
        _loss("kl_div", parameters={"log_target": Parameter(False)}),
        _loss(
            "poisson_nll_loss",
            parameters={
                "log_input": Parameter(True),
                "full": Parameter(False),
                "eps": Parameter(1e-8),
            },
        ),
        _loss(
            "gaussian_nll_loss",
            arguments=("input", "target", "var"),
            differentiable=("input", "target", "var"),
            parameters={"full": Parameter(False), "eps": Parameter(1e-6)},
        ),
        _loss(
            "tweedie_nll_loss",
            parameters={
                "power": Parameter(1.5, 0.0),
                "log_input": Parameter(True),
                "eps": Parameter(1e-8),
            },
        ),
    )
}


def losses() -> list[Loss]:
    """Every loss of this build with its properties."""
    return list(_LOSSES.values())


def find(name: str) -> Loss:
    """Return the loss of that name, or raise ValueError with the names there are."""
    try:
        return _LOSSES[name]
    except KeyError:
        raise ValueError(
            f"mbkern: unknown loss {name!r}; available: {', '.join(_LOSSES)}"
        ) from None
