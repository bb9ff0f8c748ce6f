"""The list of losses of rows of several tensors: one row a loss, as ``cases`` has for the others.

A row is a formula in fp64, torch's function, a builder of its tensors by name, and the options it
is tried with.
"""

from __future__ import annotations

from typing import Any

import row_formulas as formulas
import row_tensors as tensors
import torch.nn.functional as F
from row_case import RowCase, RowSample, Variation
from torch import Tensor

import mbkern

_WEIGHT = {"weight": tensors.class_weight}
_SAMPLE = {"sample_weight": tensors.item_weight}
_PLAIN = Variation("plain")
_WEIGHTED = (_PLAIN, Variation("weight", _WEIGHT))
_SAMPLES = (
    Variation("sample weight", _SAMPLE, torch=False),
    Variation("denominator", {"denominator": 7.5}, torch=False),
    Variation("both", _SAMPLE | {"denominator": 3.0}, torch=False),
)
_IGNORED = (
    Variation("ignored", {"target": tensors.some_ignored}),
    Variation("all ignored", {"target": tensors.none_left}),
    Variation("ignored class", {"target": tensors.any_class, "ignore_index": 0}, torch=False),
    Variation("weighted, ignored", {"target": tensors.some_ignored, **_SAMPLE}, torch=False),
)
_CLASSES = (
    *_IGNORED[:2],
    Variation("weight, ignored", {"target": tensors.some_ignored, **_WEIGHT}),
    Variation("ignored class", {"ignore_index": 0}),
    Variation("everything", {"target": tensors.some_ignored, **_WEIGHT, **_SAMPLE}, torch=False),
)
_WARM = Variation("warm", {"temperature": 2.5}, torch=False)
_COLD = Variation("cold", {"temperature": 0.4}, torch=False)


def _of(**named: dict[str, Any]) -> tuple[Variation, ...]:
    return tuple(Variation(name.replace("_", " "), options) for name, options in named.items())


_LOSS = mbkern.nn
_ONE = ("input",)
_BOTH = ("input", "target")
_PAIR = ("student", "teacher")

ROW_CASES = (
    RowCase(
        "nll_loss", _ONE, formulas.nll, F.nll_loss, _LOSS.NLLLoss, tensors.log_probabilities,
        (*_WEIGHTED, *_CLASSES, *_SAMPLES), images=True,
    ),
    RowCase(
        "multi_margin_loss", _ONE, formulas.multi_margin, F.multi_margin_loss,
        _LOSS.MultiMarginLoss, tensors.logits, (
            *_WEIGHTED, *_SAMPLES,
            *_of(squared={"p": 2}, wide={"margin": 3.5}, all={"p": 2, "margin": 0.3, **_WEIGHT}),
        ), size=formulas.multi_margin_size,
    ),
    RowCase(
        "multilabel_margin_loss", _ONE, formulas.multilabel_margin, F.multilabel_margin_loss,
        _LOSS.MultiLabelMarginLoss, tensors.labels, (_PLAIN, *_SAMPLES),
        size=formulas.multilabel_margin_size,
    ),
    RowCase(
        "multilabel_soft_margin_loss", _BOTH, formulas.multilabel_soft_margin,
        F.multilabel_soft_margin_loss, _LOSS.MultiLabelSoftMarginLoss, tensors.multi_hot,
        (
            *_WEIGHTED, *_SAMPLES,
            Variation("both weights", _WEIGHT | _SAMPLE, torch=False),
        ), size=formulas.multilabel_soft_margin_size,
    ),
    RowCase(
        "cosine_embedding_loss", ("input1", "input2"), formulas.cosine, F.cosine_embedding_loss,
        _LOSS.CosineEmbeddingLoss, tensors.pairs,
        (_PLAIN, *_SAMPLES, *_of(margin={"margin": 0.1}, negative={"margin": -0.5})),
        size=formulas.cosine_size,
    ),
    RowCase(
        "triplet_margin_loss", ("anchor", "positive", "negative"), formulas.triplet,
        F.triplet_margin_loss, _LOSS.TripletMarginLoss, tensors.triples,
        (
            _PLAIN, *_SAMPLES,
            *_of(swap={"swap": True}, margin={"margin": 0.2}, eps={"eps": 0.01, "swap": True}),
        ), size=formulas.triplet_size,
    ),
    RowCase(
        "dice_loss", _BOTH, formulas.dice, None, _LOSS.DiceLoss, tensors.shares,
        (_PLAIN, *_SAMPLES, *_of(smooth={"smooth": 0.1}, none={"smooth": 0.0})),
        size=formulas.dice_size,
    ),
    RowCase(
        "softmax_focal_loss", _ONE, formulas.focal, None, _LOSS.SoftmaxFocalLoss, tensors.logits,
        (
            *_WEIGHTED, *_CLASSES, *_SAMPLES, _WARM, _COLD,
            *_of(none={"gamma": 0.0}, linear={"gamma": 1.0}, soft={"gamma": 0.5}),
            *_of(steep={"gamma": 3.5, "temperature": 1.5}),
        ), images=True,
    ),
    RowCase(
        "kl_div_with_logits", _PAIR, formulas.kl, None, _LOSS.KLDivWithLogits,
        tensors.distributions,
        (
            _PLAIN, *_IGNORED, *_SAMPLES, _WARM, _COLD,
            *_of(reverse={"direction": "reverse"}),
            *_of(reverse_warm={"direction": "reverse", "temperature": 2.0, **_SAMPLE}),
        ), images=True, size=formulas.kl_size,
    ),
    RowCase(
        "js_div_with_logits", _PAIR, formulas.js, None, _LOSS.JSDivWithLogits,
        tensors.distributions,
        (
            _PLAIN, *_IGNORED, *_SAMPLES, _WARM,
            *_of(low={"beta": 0.1}, high={"beta": 0.9, "temperature": 2.0}),
        ), images=True, size=formulas.js_size,
    ),
    RowCase(
        "tv_distance_with_logits", _PAIR, formulas.tv, None, _LOSS.TVDistanceWithLogits,
        tensors.distributions,
        (_PLAIN, *_IGNORED, *_SAMPLES, _WARM, _COLD), images=True, size=formulas.tv_size,
    ),
    RowCase(
        "entropy_with_logits", _ONE, formulas.entropy, None, _LOSS.EntropyWithLogits, tensors.alone,
        (_PLAIN, *_IGNORED, *_SAMPLES, _WARM, _COLD), images=True, size=formulas.entropy_size,
    ),
    RowCase(
        "info_nce_loss", ("similarity",), formulas.info_nce, None, _LOSS.InfoNCELoss,
        tensors.similarities,
        (_PLAIN, *_SAMPLES, _WARM, _COLD), registered=False,
    ),
)  # fmt: skip

KERNELS = tuple(case for case in ROW_CASES if case.registered)


def direct(case: RowCase, sample: RowSample) -> tuple[list[Tensor], dict[str, Any]]:
    """The arguments of ``mbkern.loss_and_grad``: tensors by position, options by name."""
    return list(sample.tensors.values()), dict(sample.options)
