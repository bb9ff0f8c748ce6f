"""Drop-in modules with the constructors and state_dict keys of ``torch.nn``.

Each takes the arguments of its counterpart in torch, or of its function in ``mbkern.functional``,
and by keyword ``inplace``, ``grad_scale``, ``denominator`` and ``loss_dtype``, as explained there.
``sample_weight``, which differs from batch to batch, goes to the call instead.
"""

from mbkern.nn._cross_entropy import CrossEntropyLoss
from mbkern.nn._elements import (
    BCELoss,
    BCEWithLogitsLoss,
    GaussianNLLLoss,
    HingeEmbeddingLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    MarginRankingLoss,
    MSELoss,
    PoissonNLLLoss,
    SmoothL1Loss,
    SoftMarginLoss,
)
from mbkern.nn._linear import LinearCrossEntropyLoss
from mbkern.nn._own import (
    DiceLoss,
    EntropyWithLogits,
    HalfSquaredError,
    HingeLoss,
    InfoNCELoss,
    JSDivWithLogits,
    KLDivWithLogits,
    LogCoshLoss,
    QuantileLoss,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
    SquaredHingeLoss,
    TVDistanceWithLogits,
    TweedieNLLLoss,
)
from mbkern.nn._rows import (
    CosineEmbeddingLoss,
    MultiLabelMarginLoss,
    MultiLabelSoftMarginLoss,
    MultiMarginLoss,
    NLLLoss,
    TripletMarginLoss,
    TripletMarginWithDistanceLoss,
)

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "EntropyWithLogits",
    "GaussianNLLLoss",
    "HalfSquaredError",
    "HingeEmbeddingLoss",
    "HingeLoss",
    "HuberLoss",
    "InfoNCELoss",
    "JSDivWithLogits",
    "KLDivLoss",
    "KLDivWithLogits",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LogCoshLoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelMarginLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "QuantileLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "SoftmaxFocalLoss",
    "SquaredHingeLoss",
    "TVDistanceWithLogits",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
    "TweedieNLLLoss",
]
