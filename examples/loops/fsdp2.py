"""FSDP2: parameters, gradients and their sums are sharded over the processes.

FSDP keeps whole gradients through a mini-batch, and they are reduced once; every process runs as
many micro-batches, of its own number of tokens.

    torchrun --nproc-per-node 2 examples/loops/fsdp2.py
"""

from __future__ import annotations

import processes
import tokens
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import mbkern
import mbkern.functional as M


def train(device: torch.device, steps: int = 60, micro_batch: int = 5) -> list[float]:
    """Train on this process's share, and return the loss of every mini-batch."""
    model = tokens.Model().to(device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model.set_requires_gradient_sync(False)  # flush() reduces, once for a mini-batch
    accumulator = mbkern.GradAccumulator(model, max_norm=1.0)
    rank, world = dist.get_rank(), dist.get_world_size()
    history = []
    for batch in tokens.batches(steps):
        share = {name: tensor[rank::world].to(device) for name, tensor in batch.items()}
        total = torch.zeros((), device=device)
        for part in mbkern.micro_batches(share, micro_batch):
            labels = part["labels"]
            logits = model(part["tokens"])
            loss = M.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            accumulator.backward(loss, count=(labels != tokens.PADDING).sum())
            total += loss.detach()
        stats = accumulator.flush()  # of all processes
        optimizer.step()
        dist.all_reduce(total)
        history.append(float(total / stats.counts[""]))
    return history


def main() -> None:
    """Train; the first process speaks."""
    losses = train(processes.enter())
    if dist.get_rank() == 0:
        print(f"loss of the first mini-batch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    processes.leave()


if __name__ == "__main__":
    main()
