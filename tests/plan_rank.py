"""One rank of test_plan.py: ``plan_rank.py RANK STORE OUT``."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import process_group
import torch
import torch.distributed as dist

import mbkern


def main() -> None:
    """Plan with a limit that only rank 1 has."""
    rank, store, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{store}", patience, world_size=2, rank=rank)
    model = torch.nn.Linear(64, 1)
    found = mbkern.plan(
        lambda x: model(x).sum(),
        torch.ones(16, 64),
        16,
        memory_limit=(2 << 30) if rank else None,
        seconds=0.2,
    )
    out.with_suffix(f".{rank}").write_text(found.to_json())
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
