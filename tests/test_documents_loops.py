"""The loops of the examples where Accelerate scales or divides losses, and where there are GPUs."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

LOOPS = Path(__file__).resolve().parents[1] / "examples" / "loops"
sys.path.insert(0, str(LOOPS))

import plain  # noqa: E402
import processes  # noqa: E402

STEPS = 15
pytestmark = pytest.mark.cpu


class Optimizer:
    """As AcceleratedOptimizer: it steps by the scaler, if there is one."""

    def __init__(self, optimizer: Any, scaler: Any) -> None:
        self.optimizer, self.scaler = optimizer, scaler

    def step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Accelerator:
    """What the loop needs of it, on one CPU: its backward divides and scales."""

    gradient_accumulation_steps = 1
    scaled = False

    def __init__(self, cpu: bool = False) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if self.scaled else None
        self.device = torch.device("cpu")
        self.process_index, self.num_processes = 0, 1

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        return model, Optimizer(optimizer, self.scaler)

    def no_sync(self, model: Any) -> Any:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss = loss / self.gradient_accumulation_steps
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def reduce(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    accelerate: Any = ModuleType("accelerate")
    accelerate.Accelerator = Accelerator
    monkeypatch.setitem(sys.modules, "accelerate", accelerate)
    spec = importlib.util.spec_from_file_location("a_loop", LOOPS / "accelerate_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scaled", [False, True])
def test_the_scale_is_divided_out_before_the_gradient_is_clipped(
    loop: Any, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16 the scaled gradient was clipped: after ``step`` its norm was 1 / scale."""
    monkeypatch.setattr(Accelerator, "scaled", scaled)
    assert loop.train(STEPS, micro_batch=7) == pytest.approx(plain.train(STEPS, 7), rel=1e-5)


def test_a_loss_that_accelerate_divides_is_refused(
    loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` may set it: gradients were that many times too small."""
    monkeypatch.setattr(Accelerator, "gradient_accumulation_steps", 4)
    with pytest.raises(SystemExit, match="gradient_accumulation_steps must be 1"):
        loop.train(1)


@pytest.mark.parametrize(
    ("gpus", "backend", "device"), [(0, "gloo", "cpu"), (1, "gloo", "cpu"), (2, "nccl", "cuda:1")]
)
def test_where_a_process_computes(
    gpus: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU there was nccl, and the model and the data lay on the CPU."""
    begun: list[str] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(processes.dist, "init_process_group", begun.append)
    assert processes.enter() == torch.device(device)
    assert begun == [backend]
