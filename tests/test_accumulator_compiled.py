"""A compiled model's gradients are accumulated like any other's."""

from __future__ import annotations

import pytest
import torch
import windows
from torch import nn

import mbkern

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


# Of torch's Dynamo, about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model() -> None:
    """Windows of three micro-batches, of two sizes, give the full batch's gradient."""
    problem, net = windows.Problem("padding"), windows.model()
    want = problem.full(net)
    compiled: nn.Module = torch.compile(net, backend="aot_eager", fullgraph=True)
    accumulator = mbkern.GradAccumulator(compiled)
    for _ in range(2):  # the second one replays what the first has compiled
        windows.run(accumulator, compiled, problem, [9, 9, 5])
        accumulator.flush()
        for grad, exact in zip(windows.gradients(net), want, strict=True):
            assert grad is not None
            assert (grad - exact).abs().max() <= 1e-14 * exact.abs().max() * len(problem.x)
    accumulator.close()
