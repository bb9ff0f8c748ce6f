"""Modules of losses that torch does not have."""

from __future__ import annotations

from torch import Tensor

from mbkern import functional as F
from mbkern.nn._module import OwnLoss


class _Targeted(OwnLoss):
    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return self._loss(input, target, sample_weight=sample_weight)


class HalfSquaredError(_Targeted):
    """:func:`mbkern.functional.half_squared_error` as a module.

    ``HalfSquaredError(reduction="mean")``
    """

    _function = staticmethod(F.half_squared_error)


class LogCoshLoss(_Targeted):
    """:func:`mbkern.functional.log_cosh_loss` as a module: ``LogCoshLoss(reduction="mean")``."""

    _function = staticmethod(F.log_cosh_loss)


class QuantileLoss(_Targeted):
    """:func:`mbkern.functional.quantile_loss` as a module.

    ``QuantileLoss(quantile=0.5, reduction="mean")``
    """

    _function = staticmethod(F.quantile_loss)


class SigmoidFocalLoss(_Targeted):
    """:func:`mbkern.functional.sigmoid_focal_loss` as a module.

    ``SigmoidFocalLoss(alpha=0.25, gamma=2.0, reduction="none")``
    """

    _function = staticmethod(F.sigmoid_focal_loss)


class HingeLoss(_Targeted):
    """:func:`mbkern.functional.hinge_loss` as a module.

    ``HingeLoss(margin=1.0, reduction="mean")``
    """

    _function = staticmethod(F.hinge_loss)


class SquaredHingeLoss(_Targeted):
    """:func:`mbkern.functional.squared_hinge_loss` as a module.

    ``SquaredHingeLoss(margin=1.0, reduction="mean")``
    """

    _function = staticmethod(F.squared_hinge_loss)


class TweedieNLLLoss(_Targeted):
    """:func:`mbkern.functional.tweedie_nll_loss` as a module.

    ``TweedieNLLLoss(power=1.5, log_input=True, eps=1e-08, reduction="mean")``
    """

    _function = staticmethod(F.tweedie_nll_loss)


class DiceLoss(_Targeted):
    """:func:`mbkern.functional.dice_loss` as a module.

    ``DiceLoss(smooth=1.0, reduction="mean")``
    """

    _function = staticmethod(F.dice_loss)


class SoftmaxFocalLoss(_Targeted):
    """:func:`mbkern.functional.softmax_focal_loss` as a module.

    ``SoftmaxFocalLoss(gamma=2.0, weight=None, ignore_index=-100, reduction="mean",
    temperature=1.0)``
    """

    _function = staticmethod(F.softmax_focal_loss)


class InfoNCELoss(OwnLoss):
    """:func:`mbkern.functional.info_nce_loss` as a module.

    ``InfoNCELoss(temperature=1.0, reduction="mean")``
    """

    _function = staticmethod(F.info_nce_loss)

    def forward(
        self, input: Tensor, target: Tensor | None = None, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a similarity matrix."""
        return self._loss(input, target, sample_weight=sample_weight)


class _Distillation(OwnLoss):
    def forward(
        self,
        input: Tensor,
        teacher: Tensor,
        *,
        target: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the student's logits against the teacher's."""
        return self._loss(input, teacher, target=target, sample_weight=sample_weight)


class KLDivWithLogits(_Distillation):
    """:func:`mbkern.functional.kl_div_with_logits` as a module.

    ``KLDivWithLogits(temperature=1.0, direction="forward", reduction="mean",
    ignore_index=-100)``
    """

    _function = staticmethod(F.kl_div_with_logits)


class JSDivWithLogits(_Distillation):
    """:func:`mbkern.functional.js_div_with_logits` as a module.

    ``JSDivWithLogits(beta=0.5, temperature=1.0, reduction="mean", ignore_index=-100)``
    """

    _function = staticmethod(F.js_div_with_logits)


class TVDistanceWithLogits(_Distillation):
    """:func:`mbkern.functional.tv_distance_with_logits` as a module.

    ``TVDistanceWithLogits(temperature=1.0, reduction="mean", ignore_index=-100)``
    """

    _function = staticmethod(F.tv_distance_with_logits)


class EntropyWithLogits(OwnLoss):
    """:func:`mbkern.functional.entropy_with_logits` as a module.

    ``EntropyWithLogits(temperature=1.0, reduction="mean", ignore_index=-100)``
    """

    _function = staticmethod(F.entropy_with_logits)

    def forward(
        self, input: Tensor, *, target: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the entropy of the rows' distributions."""
        return self._loss(input, target=target, sample_weight=sample_weight)
