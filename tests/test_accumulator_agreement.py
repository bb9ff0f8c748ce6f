"""Ranks that have seen different things of a window, or of which one fails, end it alike."""

from __future__ import annotations

from pathlib import Path

import distributed_agreement as worker
import process_group
import pytest
import torch
from torch_versions import shards_on_cpu

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]

ROUNDS = 6  # of random windows; hundreds have been run
SHARDS = [] if shards_on_cpu.mark.args[0] else ["shards"]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_agree(world: int, tmp_path: Path) -> None:
    process_group.run(worker.__file__, world, tmp_path, str(ROUNDS), *SHARDS)
