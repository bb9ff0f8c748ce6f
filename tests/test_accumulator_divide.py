"""What FSDP2 is told to divide gradients by makes no difference: it is multiplied in again."""

from __future__ import annotations

from pathlib import Path

import distributed_divide as worker
import process_group
import pytest
import torch
from torch_versions import shards_on_cpu

import mbkern

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@shards_on_cpu
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_same_as_one_process(world: int, tmp_path: Path) -> None:
    """``set_gradient_divide_factor`` on every module, under FSDP (2 ranks) and HSDP (4)."""
    process_group.run(worker.__file__, world, tmp_path)
    alone = worker.new_model(unused=False)
    rows = slice(0, len(worker.batches()[0][0]))
    want = worker.window(mbkern.GradAccumulator(alone), alone, [rows])
    for rank in range(world):
        found = torch.load(tmp_path / f"out.{rank}")
        assert len(found) == len(worker.FACTORS) * len(worker.WAYS)
        for name, tensors in found.items():
            for a, b in zip(tensors, want, strict=True):
                assert (a - b).abs().max() <= 1e-6 * b.abs().max() + 1e-7, name
