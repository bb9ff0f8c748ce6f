"""A model whose head is fused trains under DDP and FSDP2 to the weights of one process."""

from __future__ import annotations

from pathlib import Path

import distributed_head as worker
import process_group
import pytest
import torch
import torch.distributed as dist

import mbkern.nn

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


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch without grad_dtype")
def test_gradients_wider_than_the_weight_are_refused_under_ddp(tmp_path: Path) -> None:
    """Before anything is written: torch would raise behind it."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    head = mbkern.nn.LinearCrossEntropyLoss(4, 7, dtype=torch.bfloat16, accumulate_into="grad")
    weight = head.linear.weight
    weight.grad_dtype = torch.float32
    x, target = torch.randn(3, 4, dtype=torch.bfloat16), torch.arange(3)
    parallel = torch.nn.parallel.DistributedDataParallel(head)
    with pytest.raises(ValueError, match="gradients of the weight's dtype only"):
        parallel(x, target).backward()
    assert weight.grad is None
    process_group.leave()
    head(x, target).backward()  # alone it is as good as before
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
