"""One rank of test_accumulator_rank_bits.py: ``distributed_bits.py RANK WORLD FOLDER``."""

from __future__ import annotations

import time

import process_group
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import mbkern

ROUNDS = 3


def window(
    accumulator: mbkern.GradAccumulator, model: DistributedDataParallel, late: float
) -> list[Tensor]:
    """The gradients and their norm, of shares that differ; this rank comes late to its end."""
    rank = dist.get_rank()
    random = torch.Generator().manual_seed(rank)
    with model.no_sync():
        for size in range(1, 3 + rank):
            x = torch.randn(size, 200, generator=random)
            accumulator.backward(model(x).square().sum(), count=size)
    time.sleep(late)
    norm = accumulator.flush().norm
    return [*(p.grad.clone() for p in model.parameters() if p.grad is not None), norm]


def main() -> None:
    """The same window several times, the ranks in another order each time; write the results."""
    rank, world, folder, _ = process_group.join()
    torch.manual_seed(0)
    layers = torch.nn.Linear(200, 301), torch.nn.Tanh(), torch.nn.Linear(301, 500)
    model = DistributedDataParallel(torch.nn.Sequential(*layers))
    accumulator = mbkern.GradAccumulator(model, max_norm=0.5)
    found = [window(accumulator, model, (rank + k) % world * 0.05) for k in range(ROUNDS)]
    torch.save(found, folder / f"out.{rank}")
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
