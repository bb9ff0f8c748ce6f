"""The demonstration runs from end to end, in small, and its claims hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for _module in ("matplotlib", "rich", "sklearn", "tokenizers"):
    pytest.importorskip(_module, reason=f"the demo extra is not installed: no {_module}")

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``demo.py --quick`` has written to."""
    folder = tmp_path_factory.mktemp("demo")
    if not DEMO.exists():
        pytest.skip("examples/ is not part of this distribution")
    command = [sys.executable, str(DEMO), "--quick", "--out", str(folder)]
    # The package that is tested here, wherever it was found.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (folder / "printed").write_text(run.stdout)
    return folder


@pytest.fixture(scope="module")
def numbers(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "demo.json").read_text())
    return loaded


def test_writes_a_picture_and_a_table(out: Path) -> None:
    picture = (out / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000
    printed = (out / "printed").read_text()
    for row in ("loss, forward + backward", "memory at its peak", "gradient bits that differ"):
        assert row in printed


def test_states_how_the_numbers_came_about(numbers: dict[str, Any]) -> None:
    assert numbers["command"].startswith("python examples/demo.py --quick")
    assert {"mbkern", "torch", "cpu", "threads", "mbkern_isa"} <= set(numbers["environment"])
    assert numbers["config"]["seed"] == 0
    assert numbers["text"]["tokens"] > 10_000


@pytest.mark.parametrize("batch", ["digits", "language model"])
def test_no_bit_depends_on_the_cut(numbers: dict[str, Any], batch: str) -> None:
    same = (numbers["digits"] if batch == "digits" else numbers)["same_logits"]
    assert same["gradient_elements"] >= 500
    cuts = same["methods"]["mbkern"]
    assert set(cuts) == {"1x50", "10x5", "50x1", "ragged"}
    for cut in cuts.values():
        assert cut["gradient_elements_different"] == cut["gradient_bits_different"] == 0
        assert cut["loss_bits_different"] == 0
    # The comparison sees a difference where there is one.
    assert same["methods"]["torch mean of means"]["ragged"]["gradient_bits_different"] > 0


def test_accumulation_is_exact(numbers: dict[str, Any]) -> None:
    errors = numbers["model_gradient_error"]
    assert max(errors["mbkern"].values()) < 1e-5
    assert errors["torch mean of means"]["ragged"] > 1e-2


def test_training_follows_torch(numbers: dict[str, Any]) -> None:
    for name, training in numbers["training"].items():
        assert len(training["curve"]) == numbers["config"]["steps"]
        assert training["curve"][-1] < training["curve"][0]
        assert training["largest_relative_difference_to_torch"] < 1e-4, name
        assert 0 < training["loss_seconds"]["median"] < training["step_seconds"]["median"]
        assert all(mib > 0 for mib in numbers["peak_memory_mib"][name].values())


def test_throughput_has_a_knee(numbers: dict[str, Any]) -> None:
    for kind in ("function", "gradient"):
        for curve in numbers["throughput"][kind].values():
            points = curve["sequences_per_second"]
            assert list(points) == [str(n) for n in numbers["config"]["micro_batches"]]
            best = max(point["median"] for point in points.values())
            assert points[str(curve["knee"])]["median"] >= 0.9 * best
            assert all(p["q1"] <= p["median"] <= p["q3"] for p in points.values())
