"""The training loops of the examples: they learn, and all of them learn the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LOOPS = Path(__file__).resolve().parents[1] / "examples" / "loops"
sys.path.insert(0, str(LOOPS))

import fastest  # noqa: E402
import plain  # noqa: E402

STEPS = 25


@pytest.fixture(scope="module")
def whole() -> list[float]:
    """The losses with whole mini-batches."""
    return plain.train(STEPS, micro_batch=24)


@pytest.mark.cpu
@pytest.mark.parametrize("micro_batch", [1, 7])
def test_plain(micro_batch: int, whole: list[float]) -> None:
    assert whole[-1] < 0.75 * whole[0]
    assert plain.train(STEPS, micro_batch) == pytest.approx(whole, rel=1e-3)


@pytest.mark.cpu
def test_fastest(whole: list[float]) -> None:
    assert fastest.train(STEPS, micro_batch=5) == pytest.approx(whole, rel=1e-3)


@pytest.mark.cpu
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("script", ["ddp.py", "fsdp2.py"])
def test_several_processes(script: str) -> None:
    """As a user starts them."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(LOOPS / script)],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"first mini-batch (\S+), of the last (\S+)", done.stdout)
    assert found
    losses = plain.train()
    assert float(found[1]) == pytest.approx(losses[0], abs=2e-3)
    assert float(found[2]) == pytest.approx(losses[-1], abs=2e-2)
