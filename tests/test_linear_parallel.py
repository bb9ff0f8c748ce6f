"""A vocabulary that is cut over processes gives what one process gives; see distributed_shards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import distributed_shards as worker
import pytest
import torch

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.mark.parametrize("world", [2, 4])
def test_same_as_one_process(world: int, tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(rank), str(world), str(tmp_path / "store")],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, errors
