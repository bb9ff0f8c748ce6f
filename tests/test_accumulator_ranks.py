"""A window over several processes gives the gradient of one process with all the items."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import distributed_window as worker
import process_group
import pytest
import torch
from torch_versions import shards_on_cpu

import mbkern

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.mark.parametrize(
    ("kind", "world"), [("sums", 2), ("parameter", 4), ("known", 2), ("ddp", 2)]
)
def test_same_as_one_process(kind: str, world: int, tmp_path: Path) -> None:
    process_group.run(worker.__file__, world, tmp_path, kind)
    alone = worker.new_model()
    accumulator = mbkern.GradAccumulator(alone, max_norm=0.5)
    want = worker.train(alone, accumulator, 0, 1, "deferred")
    found = [torch.load(tmp_path / f"out.{rank}") for rank in range(world)]
    for rank in found:
        for a, b, c in zip(rank, want, found[0], strict=True):
            assert torch.equal(a, c), "ranks differ"
            assert (a - b).abs().max() <= 1e-6 * b.abs().max() + 1e-7


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("fsdp", 2),
        ("fsdp late", 2),
        ("fsdp mixed", 2),
        ("fsdp known", 4),
        ("fsdp kept known", 4),
        ("hsdp", 4),
        ("hsdp kept", 4),
    ],
)
@shards_on_cpu
def test_shards(kind: str, world: int, tmp_path: Path) -> None:
    process_group.run(worker.__file__, world, tmp_path, kind)
    alone = worker.new_model()
    accumulator = mbkern.GradAccumulator(alone, max_norm=0.5)
    want = worker.train(alone, accumulator, 0, 1, "deferred")
    accumulator.close()
    want += worker.fsdp_alone(alone, world)
    for rank in range(world):
        for a, b in zip(torch.load(tmp_path / f"out.{rank}"), want, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max() + 1e-7


def test_a_rank_that_dies_is_an_error(tmp_path: Path) -> None:
    done = process_group.start(worker.__file__, 2, tmp_path, "dead")
    assert done[0].returncode != 0
    assert "RuntimeError" in done[0].stderr or "Connection" in done[0].stderr


AVERAGED = """
import torch, mbkern, process_group
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
for given in (list(model.parameters()), model.module):
    accumulator = mbkern.GradAccumulator(given)
    try:
        accumulator.backward(model(torch.ones(4, 3)).sum(), count=4)
    except RuntimeError as error:
        assert "no_sync()" in str(error), error
    else:
        raise AssertionError("it was averaged, and nothing said")
    accumulator.close()
    model.zero_grad()
process_group.leave()
"""


def test_what_data_parallelism_averaged_is_refused() -> None:
    """Where the accumulator was not given the module that averages."""
    done = subprocess.run(
        [sys.executable, "-c", AVERAGED], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr


def test_streaming_is_refused() -> None:
    with pytest.raises(ValueError, match="all-reduce each"):
        mbkern.GradAccumulator(worker.new_model(), mode="streaming", process_group=object())


GROUP_ENDS = """
import sys, torch, mbkern
from pathlib import Path

def gloo_threads():
    return sum("gloo_runloop" in p.read_text() for p in Path("/proc/self/task").glob("*/comm"))

torch.distributed.init_process_group("gloo", f"file://{sys.argv[1]}", rank=0, world_size=1)
model = torch.nn.Linear(3, 2)
accumulator = mbkern.GradAccumulator(
    model, max_norm=1.0, process_group=torch.distributed.group.WORLD
)
accumulator.backward(model(torch.ones(4, 3)).sum(), count=4)
accumulator.flush()
assert gloo_threads() or torch.__version__ < "2.13"  # older ones name them otherwise
assert "torch.distributed.fsdp" not in sys.modules
del accumulator
torch.distributed.destroy_process_group()
assert not gloo_threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_process_group_ends(tmp_path: Path) -> None:
    """Nothing of an accumulator keeps the group, and so gloo's threads, until Python ends."""
    done = subprocess.run(
        [sys.executable, "-c", GROUP_ENDS, str(tmp_path / "store")],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
