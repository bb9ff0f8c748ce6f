"""DistributedDataParallel: each process has its share of the mini-batch, of any size.

Gradients are sums, so shares need not be even; one all-reduce, when the mini-batch ends.

    torchrun --nproc-per-node 2 examples/loops/ddp.py
"""

from __future__ import annotations

import processes
import tokens
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mbkern
import mbkern.functional as M


def train(device: torch.device, steps: int = 60, micro_batch: int = 5) -> list[float]:
    """Train on this process's share, and return the loss of every mini-batch."""
    model = DistributedDataParallel(tokens.Model().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    accumulator = mbkern.GradAccumulator(model, max_norm=1.0)  # brings the process group
    rank, world = dist.get_rank(), dist.get_world_size()
    history = []
    for batch in tokens.batches(steps):
        share = {name: tensor[rank::world].to(device) for name, tensor in batch.items()}
        total = torch.zeros((), device=device)
        for part in mbkern.micro_batches(share, micro_batch):
            labels = part["labels"]
            with model.no_sync():  # forward, too
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
