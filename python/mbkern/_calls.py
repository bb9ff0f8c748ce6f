"""The call of a loss over several tensors, by its kind."""

from __future__ import annotations

from mbkern._launch_multirow import MultirowCall
from mbkern._launch_pointwise import PointwiseCall
from mbkern._launch_tensors import Inputs, TensorCall, TensorOptions
from mbkern._losses import Loss


def new_call(loss: Loss, inputs: Inputs, options: TensorOptions) -> TensorCall:
    """Return a call of the loss's kind."""
    kind = PointwiseCall if loss.kind == "pointwise" else MultirowCall
    return kind(loss, inputs, options)
