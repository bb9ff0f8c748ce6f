"""The examples, on a small scale: mbkern in micro-batches ends where torch ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

pytest.importorskip("sklearn")

import detection
import regression


def test_regression() -> None:
    """The same gradients to rounding, hence the same model; a share is a multiple of 1 / 100."""
    found = regression.run(epochs=8)
    ours, theirs = found["mean absolute error"]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours < 0.75  # the mean as a guess has 0.84
    for name, (ours, theirs) in found.items():
        assert ours == pytest.approx(theirs, abs=0.021), name


def test_detection() -> None:
    found = detection.run(epochs=6)
    ours, theirs = found["focal loss, mbkern"], found["focal loss, torch"]
    assert ours == pytest.approx(theirs, abs=2e-3)
    assert ours > 0.5  # 0.02 is chance
