"""A window over several processes gives the same bits every time it is run."""

from __future__ import annotations

from pathlib import Path

import distributed_bits as worker
import process_group
import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


def run(world: int, folder: Path) -> list[list[Tensor]]:
    """All windows of all ranks."""
    folder.mkdir()
    process_group.run(worker.__file__, world, folder)
    return [window for rank in range(world) for window in torch.load(folder / f"out.{rank}")]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_from_run_to_run(world: int, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, flat buffers; the ranks come to the end in any order."""
    first, *others = run(world, tmp_path / "one") + run(world, tmp_path / "two")
    assert len(others) == 2 * world * worker.ROUNDS - 1
    assert all(tensor.any() for tensor in first)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a.numpy().tobytes() == b.numpy().tobytes()
