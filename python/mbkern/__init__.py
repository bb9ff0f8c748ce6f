"""Batched losses and their gradients, fused, in place.

The results are the same bits for every cut of a mini-batch.

- :mod:`mbkern.functional`, :mod:`mbkern.nn`: losses with the names and arguments of torch's.
- :class:`GradAccumulator`, :func:`accumulate_`, :func:`flush_`: exact sums over micro-batches.
- :func:`micro_batches`, :func:`plan`: a batch cut up, and how many items to compute at once.
- :func:`loss_and_grad`, :class:`LossSum`: without autograd; the exact sum of losses.
- :func:`patched`, :func:`patch`: torch's own functions and modules run on mbkern.
- ``python -m mbkern``: what is installed, whether it works, how fast it is.
"""

import torch  # noqa: F401  first: it loads the OpenMP runtime whose threads the kernels use

try:
    from mbkern import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mbkern: the compiled module mbkern._C cannot be loaded ({error}). Cause: the package is "
        "imported from its source tree, or was built for another Python or system. Cure: leave the "
        "source directory and run `pip install .` there with this Python; `python -m mbkern "
        "doctor` then says what was built."
    ) from error

from mbkern import autograd, functional, nn
from mbkern._accumulate import Measured, accumulate_
from mbkern._accumulator import GradAccumulator
from mbkern._accumulator_flush import WindowStats
from mbkern._cuda import TargetErrors, take_target_errors
from mbkern._flush import FlushStats, flush_
from mbkern._linear_stats import LinearStats
from mbkern._loss_and_grad import loss_and_grad
from mbkern._loss_sum import LossSum
from mbkern._losses import losses
from mbkern._micro_batches import MicroBatches, micro_batches
from mbkern._noise_scale import NoiseScale
from mbkern._patched import PatchReport, patch, patched, unpatch
from mbkern._plan_result import Plan
from mbkern._planner import plan
from mbkern._version import NUMERICS_VERSION, __version__

__all__ = [
    "NUMERICS_VERSION",
    "FlushStats",
    "GradAccumulator",
    "LinearStats",
    "LossSum",
    "Measured",
    "MicroBatches",
    "NoiseScale",
    "PatchReport",
    "Plan",
    "TargetErrors",
    "WindowStats",
    "__version__",
    "accumulate_",
    "autograd",
    "flush_",
    "functional",
    "loss_and_grad",
    "losses",
    "micro_batches",
    "nn",
    "patch",
    "patched",
    "plan",
    "take_target_errors",
    "unpatch",
]
