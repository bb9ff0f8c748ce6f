"""The fused head as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mbkern import functional as F
from mbkern._arguments import Number


class _Shared:
    """What copies of a module have in common."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self

    def __reduce__(self) -> Any:
        if self.value is None:
            return _Shared, (None,)
        raise TypeError("mbkern: a process group cannot be pickled: save the module's state_dict()")


class LinearCrossEntropyLoss(torch.nn.Module):
    """Linear, then cross-entropy, without the logits: a head that owns its weight.

    The counterpart of ``torch.nn.LinearCrossEntropyLoss`` (torch >= 2.13), with its arguments and
    state_dict keys (``linear.weight``, ``linear.bias``, ``weight``), and by keyword those of
    :func:`mbkern.functional.linear_cross_entropy`. Tie the weight to an embedding's by assignment:
    ``head.linear.weight = embedding.weight``.

    Args:
        in_features: size of each input sample.
        num_classes: number of classes, C; with ``process_group`` those of this rank.
        out_features: (d1, ...) for a loss of each of d1, ...; the linear layer has C * d1 * ...
            rows.
        bias: whether the linear layer has one.
        weight: one weight a class, (C); with ``process_group`` of the classes of all ranks.
        ignore_index: None is -100.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: Number | None = None,
        denominator: Number | None = None,
        shift: bool | int = False,
        grad_scale: Number | None = None,
        accumulate_into: Tensor | str | None = None,
        split_invariant: bool = False,
        chunk_bytes: int | None = None,
        filter_eps: float | str | None = None,
        return_stats: bool = False,
        loss_dtype: torch.dtype | None = None,
        process_group: Any = None,
    ) -> None:
        if process_group is None and weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"mbkern: weight must have one entry for each of the {num_classes} classes, not "
                f"shape {tuple(weight.shape)}"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"mbkern: label_smoothing must be in [0, 1], not {label_smoothing}")
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.denominator = denominator
        self.shift = shift
        self.grad_scale = grad_scale
        self.accumulate_into = accumulate_into
        self.split_invariant = split_invariant
        self.chunk_bytes = chunk_bytes
        self.filter_eps = filter_eps
        self.return_stats = return_stats
        self.loss_dtype = loss_dtype
        self._group = _Shared(process_group)

    @property
    def process_group(self) -> Any:
        """Over which the classes are cut; a copy of the module has the same."""
        return self._group.value

    def extra_repr(self) -> str:
        """What is not the linear layer's."""
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, "
            f"reduction={self.reduction!r}"
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        num_valid: int | None = None,
    ) -> Any:
        """Return the loss of hidden states ``input`` (*, in_features) and ``target``; with
        ``return_stats`` a pair, loss and statistics."""
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            weight = weight.reshape(*shape, weight.shape[-1])
            bias = None if bias is None else bias.reshape(shape)
        return F.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            denominator=self.denominator,
            shift=self.shift,
            grad_scale=self.grad_scale,
            accumulate_into=self.accumulate_into,
            split_invariant=self.split_invariant,
            chunk_bytes=self.chunk_bytes,
            sample_weight=sample_weight,
            num_valid=num_valid,
            filter_eps=self.filter_eps,
            return_stats=self.return_stats,
            loss_dtype=self.loss_dtype,
            process_group=self.process_group,
        )
