"""What a loss only reads is not written to, whatever its layout: it may be expanded, or a file."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES
from guarded import in_child
from row_cases import ROW_CASES
from torch import Tensor

import mbkern

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 4, 2, 3)
Operands = dict[str, Tensor]


def _strided(t: Tensor) -> Tensor:
    """In every second place of the last dimension, so that no dimensions merge."""
    memory = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
    view = memory[..., 1::2]
    view.copy_(t)
    return view


def _expanded(t: Tensor) -> Tensor:
    """The first part of the second dimension but last, for all of it."""
    dim = max(t.dim() - 2, 0)
    return _strided(t).narrow(dim, 0, 1).expand(t.shape)


def _call_of(name: str) -> tuple[Callable[..., Tensor], Operands]:
    for case in CASES:
        if case.name == name:
            sample = case.sample(SHAPE, torch.float32)
            tensors = case.tensors(sample)
            break
    else:
        row = next(row for row in ROW_CASES if row.name == name)
        tensors = dict(row.sample(SHAPE).tensors)
    first = next(iter(tensors.values()))
    loss = next(loss for loss in mbkern.losses() if loss.name == name)
    of_rows = loss.kind != "pointwise"
    items = first[:, 0] if of_rows else first
    if name != "dice_loss":
        tensors["sample_weight"] = 0.25 + torch.rand(items.shape)
    if "target" in loss.optional:
        tensors["target"] = torch.randint(4, items.shape)
    return getattr(mbkern.functional, name), tensors


FLAT = [loss.name for loss in mbkern.losses() if loss.is_flat]
NAMES = [loss.name for loss in mbkern.losses() if loss.name not in FLAT]


@pytest.mark.parametrize("layout", [_strided, _expanded], ids=["strided", "expanded"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_operands_are_read_only(
    name: str, layout: Callable[[Tensor], Tensor], reduction: str
) -> None:
    torch.manual_seed(0)
    function, tensors = _call_of(name)
    first, *others = tensors
    for operand in others:
        viewed = tensors | {operand: layout(tensors[operand])}
        x = viewed[first].detach().requires_grad_()
        version, memory = viewed[operand]._version, viewed[operand].clone()
        value = function(**viewed | {first: x}, reduction=reduction)
        value.sum().backward()
        assert viewed[operand]._version == version, operand
        assert torch.equal(viewed[operand], memory)
        y = tensors[first].detach().requires_grad_()
        want = function(**viewed | {first: y, operand: memory.contiguous()}, reduction=reduction)
        want.sum().backward()
        assert torch.equal(value, want)
        assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_target_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes"
    path.write_bytes(torch.randint(4, (2, 2, 7)).numpy().tobytes())
    x = torch.randn(SHAPE).log_softmax(1)

    def call() -> None:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        target = torch.frombuffer(memory, dtype=torch.int64).view(2, 2, 7)[..., 1::2]
        want = torch.nn.functional.nll_loss(x, target)
        torch.testing.assert_close(mbkern.functional.nll_loss(x, target), want)

    in_child(call)
