"""One rank of test_linear_distributed.py: ``distributed_head.py RANK WORLD FOLDER KIND``."""

from __future__ import annotations

import process_group
import torch
import torch.distributed as dist
from torch import Tensor

import mbkern.nn

FEATURES, CLASSES, ROWS, STEPS = 8, 37, 24, 6


class Model(torch.nn.Module):
    """A body, and the head that owns its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(5, FEATURES)
        self.head = mbkern.nn.LinearCrossEntropyLoss(
            FEATURES, CLASSES, bias=True, reduction="sum", chunk_bytes=500
        )

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.head(torch.tanh(self.body(x)), target)
        return loss


def batches() -> list[tuple[Tensor, Tensor]]:
    """The mini-batch of each step; the last item of some is ignored."""
    g = torch.Generator().manual_seed(8)
    found = []
    for step in range(STEPS):
        target = torch.randint(CLASSES, (ROWS,), generator=g)
        target[: step * 2] = -100
        found.append((torch.randn(ROWS, 5, generator=g), target))
    return found


def train(model: torch.nn.Module, rank: int, world: int, parameters: list[Tensor]) -> None:
    """Uneven shares of every mini-batch, one mean over all that counts."""
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    cut = [0, 5, ROWS] if world == 2 else [0, 1, 7, 13, ROWS] if world == 4 else [0, ROWS]
    for x, target in batches():
        count = int((target != -100).sum())
        part = slice(cut[rank], cut[rank + 1])
        optimiser.zero_grad()
        # Data parallelism takes the mean over ranks.
        (model(x[part], target[part]) * (world / count)).backward()
        optimiser.step()


def main() -> None:
    """Train, and let rank 0 write the weights."""
    rank, world, folder, (kind,) = process_group.join()
    torch.manual_seed(0)
    model = Model()
    if kind == "ddp":
        wrapped: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (world,))
        fully_shard(model.body, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    train(wrapped, rank, world, list(wrapped.parameters()))
    weights = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in model.named_parameters()
    }
    if rank == 0:
        torch.save(weights, folder / "out")
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
