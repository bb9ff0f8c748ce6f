"""One rank of test_plan.py: ``plan_rank.py RANK WORLD FOLDER``."""

from __future__ import annotations

import json
from typing import Any

import process_group
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mbkern


def main() -> None:
    """Plan with a limit that only rank 1 has, and estimates of the noise scale that differ; then
    where the ranks differ in what they must not."""
    rank, _, folder, _ = process_group.join()
    model = torch.nn.Linear(64, 1)

    def step(x: Tensor) -> Tensor:
        return model(x).sum()

    found = mbkern.plan(
        step,
        torch.ones(16, 64),
        16,
        memory_limit=(2 << 30) if rank else None,
        noise_scale=torch.tensor(3.0 + rank) if rank else float("nan"),
        seconds=0.2,
    )
    (folder / f"out.{rank}").write_text(found.to_json())
    # Each of these hung, or gave the ranks different plans.
    said = [mbkern.plan(step, torch.ones(16 if rank else 4, 64), 16, seconds=0.1 + rank).to_json()]

    def refusing(size: int, error: type[Exception]) -> Any:
        def refuse(x: Tensor) -> Tensor:
            if rank and len(x) == size:
                raise error("for a reason of its own")
            return step(x)

        return refuse

    said.append(mbkern.plan(refusing(1, ValueError), torch.ones(8, 64), 8, seconds=0.1).to_json())
    for run, options in (
        (refusing(4, KeyError), {}),
        (step, {"objective": "memory" if rank else "throughput"}),
        (step, {"noise_scale": torch.ones(2)} if rank else {}),
    ):
        with pytest.raises(Exception, match=r".") as caught:
            mbkern.plan(run, torch.ones(8, 64), 8, seconds=0.1, **options)
        said.append(f"{caught.type.__name__}: {caught.value}")
    (folder / f"said.{rank}").write_text(json.dumps(said))
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    main()
