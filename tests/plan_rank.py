"""One rank of test_plan.py: ``plan_rank.py RANK WORLD FOLDER``."""

from __future__ import annotations

import process_group
import torch
import torch.distributed as dist

import mbkern


def main() -> None:
    """Plan with a limit that only rank 1 has, and estimates of the noise scale that differ."""
    rank, _, folder, _ = process_group.join()
    model = torch.nn.Linear(64, 1)
    found = mbkern.plan(
        lambda x: model(x).sum(),
        torch.ones(16, 64),
        16,
        memory_limit=(2 << 30) if rank else None,
        noise_scale=torch.tensor(3.0 + rank) if rank else float("nan"),
        seconds=0.2,
    )
    (folder / f"out.{rank}").write_text(found.to_json())
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
