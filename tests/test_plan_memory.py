"""What the planner measures of memory, and the limits that it finds or is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mbkern
from mbkern import _plan_memory
from mbkern._plan_cli import memory_size

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

KNOWN = """
import torch, mbkern
weight = torch.ones((), requires_grad=True)
unit = 8 << 20
def step(x):
    kept = torch.ones(2 * unit), torch.ones(len(x) * unit)
    return weight * (kept[0][0] + kept[1][0])
plan = mbkern.plan(step, torch.ones(4, 1), 4, memory_limit=1 << 34, seconds=0.1)
shares = [p.gradient_bytes / (2 + p.items) for p in plan.probes]
print(*(share / (4 * unit) for share in (plan.item_bytes, *shares)))
"""


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="NOT CHECKED: the address sanitizer keeps what is freed",
)
def test_memory_is_what_a_pass_takes() -> None:
    """A pass whose live memory is known: 32 MB an item, above 64 MB. In a process of its own: what
    many tests have left of the heap may take a block or leave it."""
    done = subprocess.run([sys.executable, "-c", KNOWN], capture_output=True, text=True, check=True)
    assert [float(share) for share in done.stdout.split()] == pytest.approx([1.0] * 4, rel=0.1)


def test_torch_own_account() -> None:
    """The way out where the kernel gives no high-water mark."""
    assert _plan_memory.allocated_by_torch(lambda: torch.ones(1 << 20)) == 4 << 20


def test_a_limit_that_binds_and_one_that_cannot_be_met() -> None:
    weight = torch.ones((), requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return weight * torch.ones(len(x) << 22).sum()

    held = _plan_memory.held(torch.device("cpu"))
    found = mbkern.plan(step, torch.ones(64), 64, memory_limit=held + (200 << 20), seconds=0.2)
    assert found.micro_batch <= 12
    assert found.peak_bytes <= found.limit_bytes == held + (200 << 20)
    with pytest.raises(MemoryError, match=r"1 item takes \d\d\.\d MiB above the"):
        mbkern.plan(step, torch.ones(64), 64, memory_limit=held + (4 << 20), seconds=0.2)


def test_sizes_of_memory() -> None:
    found = [memory_size(text) for text in ("1500", "2k", "1.5GiB", "3 MB")]
    assert found == [1500, 2048, 3 << 29, 3 << 20]


def test_a_control_group_limits(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert _plan_memory._left_in_group(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert _plan_memory._left_in_group(tmp_path) > 1 << 60
