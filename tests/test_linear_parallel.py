"""A vocabulary that is cut over processes gives what one process gives; see distributed_shards."""

from __future__ import annotations

from pathlib import Path

import distributed_shards as worker
import process_group
import pytest
import torch

from mbkern._launch import exact_add, exact_result
from mbkern._linear_shards_exact import exact_sum

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.mark.parametrize("world", [2, 4])
def test_same_as_one_process(world: int, tmp_path: Path) -> None:
    process_group.run(worker.__file__, world, tmp_path, seconds=180)


def test_exact_sum() -> None:
    """Rounded once, as the kernels' own exact sums are: half-way cases and a wide range, too."""
    g = torch.Generator().manual_seed(3)
    values = torch.rand(400, 130, generator=g)
    values[:200] *= torch.exp2(torch.randint(-130, 10, (200, 130), generator=g).float())
    values[200:300] = (values[200:300] < 0.1) * 2.0**-30
    values[200:300, 5] = 1.0 + 2.0**-23
    values[200:300, 77] = 2.0**-24  # half of the last place
    values[280:300] = 0.0  # what decides lies below the highest digit
    values[280:300, 5], values[280:300, 77], values[280:300, 100] = 1.0, 2.0**-24, 2.0**-70
    values[300] = 0.0
    found = exact_sum(values)
    for row, value in zip(values, found, strict=True):
        total = torch.zeros(12, dtype=torch.int64)
        exact_add(total, row)
        assert torch.equal(exact_result(total, None, torch.float32), value)
