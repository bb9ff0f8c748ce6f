"""The loops of other libraries (`make integrations`) learn what the plain one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "loops"))

STEPS = 25
pytestmark = pytest.mark.cpu


def test_trainer() -> None:
    """Cut or whole, the Trainer's own clipping and schedule included."""
    pytest.importorskip("transformers", reason="see make integrations")
    import hf_trainer

    whole = hf_trainer.train(STEPS, micro_batch=24)
    assert len(whole) == STEPS
    assert whole[-1] < 0.8 * whole[0]
    assert hf_trainer.train(STEPS, micro_batch=4) == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_loops(name: str) -> None:
    pytest.importorskip(name, reason="see make integrations")
    import plain

    loop = __import__(f"{name}_loop")
    assert loop.train(STEPS, micro_batch=7) == pytest.approx(plain.train(STEPS, 7), rel=1e-4)
