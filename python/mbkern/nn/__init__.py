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
from mbkern.nn._own import (
    HalfSquaredError,
    HingeLoss,
    LogCoshLoss,
    QuantileLoss,
    SigmoidFocalLoss,
    SquaredHingeLoss,
    TweedieNLLLoss,
)

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HalfSquaredError",
    "HingeEmbeddingLoss",
    "HingeLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LogCoshLoss",
    "MSELoss",
    "MarginRankingLoss",
    "PoissonNLLLoss",
    "QuantileLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "SquaredHingeLoss",
    "TweedieNLLLoss",
]
