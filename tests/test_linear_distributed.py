"""A model whose head is fused trains under DDP and FSDP2 to the weights of one process."""

from __future__ import annotations

from pathlib import Path

import distributed_head as worker
import process_group
import pytest
import torch

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_same_weights_as_one_process(kind: str, world: int, tmp_path: Path) -> None:
    process_group.run(worker.__file__, world, tmp_path, kind)
    torch.manual_seed(0)
    alone = worker.Model()
    worker.train(alone, 0, 1, list(alone.parameters()))
    found = torch.load(tmp_path / "out")
    for name, want in alone.named_parameters():
        torch.testing.assert_close(found[name], want.detach(), rtol=1e-5, atol=1e-6)
