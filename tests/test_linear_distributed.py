"""A model whose head is fused trains under DDP and FSDP2 to the weights of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import distributed_head as worker
import pytest
import torch

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_same_weights_as_one_process(kind: str, world: int, tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    ranks = [
        subprocess.Popen(
            [sys.executable, worker.__file__, kind, str(rank), str(world),
             str(tmp_path / "store"), str(out)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, errors
    torch.manual_seed(0)
    alone = worker.Model()
    worker.train(alone, 0, 1, list(alone.parameters()))
    found = torch.load(out)
    for name, want in alone.named_parameters():
        torch.testing.assert_close(found[name], want.detach(), rtol=1e-5, atol=1e-6)
