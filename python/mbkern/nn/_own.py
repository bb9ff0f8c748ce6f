"""Modules of losses that torch does not have."""

from __future__ import annotations

from mbkern import functional as F
from mbkern.nn._module import OwnLoss


class HalfSquaredError(OwnLoss):
    """:func:`mbkern.functional.half_squared_error` as a module."""

    _function = staticmethod(F.half_squared_error)


class LogCoshLoss(OwnLoss):
    """:func:`mbkern.functional.log_cosh_loss` as a module."""

    _function = staticmethod(F.log_cosh_loss)


class QuantileLoss(OwnLoss):
    """:func:`mbkern.functional.quantile_loss` as a module."""

    _function = staticmethod(F.quantile_loss)


class SigmoidFocalLoss(OwnLoss):
    """:func:`mbkern.functional.sigmoid_focal_loss` as a module."""

    _function = staticmethod(F.sigmoid_focal_loss)


class HingeLoss(OwnLoss):
    """:func:`mbkern.functional.hinge_loss` as a module."""

    _function = staticmethod(F.hinge_loss)


class SquaredHingeLoss(OwnLoss):
    """:func:`mbkern.functional.squared_hinge_loss` as a module."""

    _function = staticmethod(F.squared_hinge_loss)


class TweedieNLLLoss(OwnLoss):
    """:func:`mbkern.functional.tweedie_nll_loss` as a module."""

    _function = staticmethod(F.tweedie_nll_loss)
