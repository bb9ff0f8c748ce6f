"""The registry of losses: what each is called, takes, and can do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mbkern import _C

_TWO = ("input", "target")


def as_number(value: Any, name: str, or_tensor: str = "") -> float:
    """A number as a float, also of an array or tensor of one element; raise for what is none, and
    for words, which Python would read."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"mbkern: {name} must be a number{or_tensor}, not {type(value).__name__}"
        ) from None
    except OverflowError:
        raise ValueError(f"mbkern: {name} is too large for a float") from None


@dataclass(frozen=True)
class Parameter:
    """A number that a loss takes by name: its default, and what it may be."""

    default: float | bool | str
    least: float = -math.inf
    most: float = math.inf
    open: bool = False  # whether the ends are left out
    inverse: bool = False  # whether the kernels take its inverse
    gap: tuple[float, float] = (0.0, 0.0)  # it may be an end of it, and nothing between
    only: str = ""  # what it may be, in words; else the range is named
    choices: tuple[str, ...] = ()  # words, of which the kernels take the position

    def check(self, name: str, value: Any) -> float:
        """Return a value as the kernels take it, or raise."""
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                words = " or ".join(map(repr, self.choices))
                raise ValueError(f"mbkern: {name} must be {words}, not {value!r}")
            return float(self.choices.index(value))
        if isinstance(self.default, bool) and not isinstance(value, Tensor):
            if value is not None and not isinstance(value, (int, np.bool_)):
                raise TypeError(f"mbkern: {name} must be True or False, not {type(value).__name__}")
            return float(bool(value))
        if type(value) is float:  # asked first: it is what nearly every call has
            number = value
        elif isinstance(value, Tensor):
            raise TypeError(
                f"mbkern: {name} must be a number, not a tensor, of which no gradient is computed"
            )
        else:
            number = as_number(value, name)
        inside = self.least < number < self.most if self.open else self.least <= number <= self.most
        inside |= self.open and number == math.inf == self.most
        if not inside or self.gap[0] < number < self.gap[1]:
            left, right = "()" if self.open else "[]"
            allowed = self.only or f"in {left}{self.least}, {self.most}{right}"
            raise ValueError(f"mbkern: {name} must be {allowed}, not {value}")
        return 1.0 / number if self.inverse else number

    def given(self, number: float) -> float | str:
        """What ``check`` returned this for."""
        if self.choices:
            return self.choices[int(number)]
        return 1.0 / number if self.inverse else number


@dataclass(frozen=True, eq=False)
class Loss:
    """One loss.

    Attributes:
        name: as in ``mbkern.functional`` and ``mbkern.loss_and_grad``.
        kind: "row" (softmax cross-entropy: an item is a row of classes), "pointwise" (an item is an
            element) or "multirow" (an item is a row of each of its tensors).
        arguments: its tensors, in order.
        inputs: how many of them, from the first, are of one shape and go to the kernel as such.
        target: what a target after those is: "index" (a class an item), "list" (a row of classes),
            "label" (a number an item), or None, without one.
        ignores: whether items may be ignored by their class.
        optional: tensors that may be left out.
        differentiable: those of them that gradients are computed for.
        parameters: the numbers it takes by name; the order is the kernels'.
        weight: what torch's ``weight`` is here: "classes"; "mean" (of an element, and ``mean``
            divides by the sum of the weights); "rescale" (of an element, not counted in the mean);
            or None, without one.
        promoting: how many of the inputs, from the first, count in the dtype of the result.
        weight_promotes: whether ``weight`` counts in it.
        differentiates_all: whether gradients are computed for all its tensors.
        is_flat: whether it takes no more than (N, C), as torch's does, or its rows would be others.
        flattens: whether the rows of more are all that there is of an item.
        domain: what the CPU refuses other values than: "probabilities" (of input and target; the
            loss of others is NaN), "variances" (of the third tensor), or None.
        compares: whether the target is only compared with numbers: torch takes one that requires
            grad, and gives it none.
        takes_numbers: whether torch's formula takes a number for all elements of a tensor that is
            not the first.
        warns: whether torch warns of an input and a target that broadcast: (N, 1) against (N) is
            hardly ever meant.
        constants: what the kernels take after the parameters. Not floats: compiled with dynamic
            shapes these are inputs of the graph, and Dynamo fails if the first to read one is a
            Function.
        number: its position in the compiled list of its kind.
    """

    name: str
    kind: str
    arguments: tuple[str, ...] = _TWO
    inputs: int = 2
    target: str | None = None
    ignores: bool = False
    optional: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = _TWO
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    weight: str | None = None
    promoting: int = 3
    weight_promotes: bool = False
    differentiates_all: bool = True
    is_flat: bool = False
    flattens: bool = False
    domain: str | None = None
    compares: bool = False
    takes_numbers: bool = False
    warns: bool = False
    constants: tuple[bool, ...] = ()
    number: int = -1

    def numbers(self, **values: Any) -> tuple[float, ...]:
        """The parameters as the kernels take them, checked; absent ones have their default."""
        numbers: tuple[float, ...] = ()
        for name, parameter in self.parameters.items():
            numbers += (parameter.check(name, values.get(name, parameter.default)),)
        if self.constants:
            numbers += tuple([float(constant) for constant in self.constants])
        return numbers

    def named(self, numbers: tuple[float, ...]) -> dict[str, Any]:
        """What :meth:`numbers` was given."""
        return {
            name: parameter.given(value)
            for (name, parameter), value in zip(self.parameters.items(), numbers, strict=False)
        }


def _loss(name: str, kind: str = "pointwise", **properties: Any) -> Loss:
    lists = {
        "row": _C.row_losses,
        "pointwise": _C.pointwise_losses,
        "multirow": _C.multirow_losses,
    }
    arguments = properties.get("arguments", _TWO)
    properties.setdefault("inputs", len(arguments))
    properties["differentiates_all"] = properties.get("differentiable", _TWO) == arguments
    return Loss(name, kind, number=lists[kind]().index(name), **properties)


def _rows(name: str, inputs: tuple[str, ...], target: str | None = None, **rest: Any) -> Loss:
    """A loss of rows, differentiable in all its inputs."""
    arguments = inputs if target is None else (*inputs, "target")
    return _loss(
        name, "multirow", arguments=arguments, inputs=len(inputs), differentiable=inputs,
        target=target, **rest,
    )  # fmt: skip


_ONE = ("input",)
_PAIR = ("student", "teacher")
_TEMPERATURE = {"temperature": Parameter(1.0, 0.0, open=True, inverse=True)}
_FOCAL = {"gamma": Parameter(2.0, 0.0), **_TEMPERATURE}
_DIRECTION = {
    **_TEMPERATURE,
    "direction": Parameter("forward", choices=("forward", "reverse")),
}
_BETA = {**_TEMPERATURE, "beta": Parameter(0.5, 0.0, 1.0)}
_DISTANCE: dict[str, Any] = {"target": "index", "ignores": True, "optional": ("target",)}
_MARGIN = {"margin": Parameter(1.0)}
_LOSSES = {
    loss.name: loss
    for loss in (
        _loss(
            "cross_entropy",
            "row",
            differentiable=_ONE,
            target="index",
            ignores=True,
            weight="classes",
        ),
        _loss("half_squared_error"),
        _loss("mse_loss", weight="mean", weight_promotes=True, warns=True),
        _loss("l1_loss", weight="mean", weight_promotes=True, warns=True),
        _loss("smooth_l1_loss", parameters={"beta": Parameter(1.0, 0.0, open=True)}, warns=True),
        _loss(
            "huber_loss",
            parameters={"delta": Parameter(1.0, 0.0, open=True)},
            weight="rescale",
            weight_promotes=True,
            warns=True,
        ),
        _loss("log_cosh_loss"),
        _loss("quantile_loss", parameters={"quantile": Parameter(0.5, 0.0, 1.0, open=True)}),
        _loss("binary_cross_entropy", weight="rescale", domain="probabilities"),
        _loss(
            "binary_cross_entropy_with_logits",
            arguments=("input", "target", "pos_weight"),
            optional=("pos_weight",),
            promoting=2,
            weight="rescale",
        ),
        _loss(
            "sigmoid_focal_loss",
            parameters={"alpha": Parameter(0.25, most=1.0), "gamma": Parameter(2.0, 0.0)},
        ),
        _loss("soft_margin_loss", differentiable=_ONE),
        _loss("hinge_embedding_loss", differentiable=_ONE, parameters=_MARGIN, compares=True),
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
            domain="variances",
            takes_numbers=True,
        ),
        _loss(
            "tweedie_nll_loss",
            parameters={
                "power": Parameter(1.5, 0.0, gap=(0.0, 1.0), only="0 or at least 1"),
                "log_input": Parameter(True),
                "eps": Parameter(1e-8),
            },
        ),
        _rows("nll_loss", _ONE, target="index", ignores=True, weight="classes"),
        _rows(
            "multi_margin_loss",
            _ONE,
            target="index",
            weight="classes",
            parameters={
                "p": Parameter(1, 1, 2, gap=(1, 2), only="1 or 2"),
                "margin": Parameter(1.0),
            },
            is_flat=True,
        ),
        _rows("multilabel_margin_loss", _ONE, target="list", is_flat=True),
        _rows(
            "multilabel_soft_margin_loss",
            _TWO,
            weight="classes",
            weight_promotes=True,
            takes_numbers=True,
            is_flat=True,
        ),
        _rows(
            "cosine_embedding_loss",
            ("input1", "input2"),
            target="label",
            parameters={"margin": Parameter(0.0)},
            compares=True,
            is_flat=True,
        ),
        _rows(
            "triplet_margin_loss",
            ("anchor", "positive", "negative"),
            parameters={
                "margin": Parameter(1.0, 0.0, open=True),
                "eps": Parameter(1e-6),
                "swap": Parameter(False),
            },
            is_flat=True,
        ),
        _rows("dice_loss", _TWO, parameters={"smooth": Parameter(1.0, 0.0)}, flattens=True),
        _rows(
            "softmax_focal_loss",
            _ONE,
            target="index",
            ignores=True,
            weight="classes",
            parameters=_FOCAL,
        ),
        _rows("kl_div_with_logits", _PAIR, parameters=_DIRECTION, constants=(True,), **_DISTANCE),
        _rows("js_div_with_logits", _PAIR, parameters=_BETA, constants=(True,), **_DISTANCE),
        _rows(
            "tv_distance_with_logits",
            _PAIR,
            parameters=_TEMPERATURE,
            constants=(False, True),
            **_DISTANCE,
        ),
        _rows("entropy_with_logits", _ONE, parameters=_TEMPERATURE, **_DISTANCE),
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
