"""Docstrings of public names say what is so; ``mbkern.autograd`` is called as its own shows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch

import mbkern
from mbkern import functional, nn
from mbkern._losses import Loss
from mbkern.autograd import Request, RowLoss, RowOptions, TensorLoss, TensorOptions


def _loss(name: str) -> Loss:
    (loss,) = (loss for loss in mbkern.losses() if loss.name == name)
    return loss


def test_a_loss_of_rows() -> None:
    logits, target = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    request = Request(_loss("cross_entropy"), RowOptions(reduction="sum", z_loss=1e-4))
    value = RowLoss.apply(logits, target, request)
    want = functional.cross_entropy(logits, target, reduction="sum", z_loss=1e-4)
    assert torch.equal(value, want)
    assert torch.equal(*(torch.autograd.grad(v, logits)[0] for v in (value, want)))


def test_a_loss_of_elements() -> None:
    x, y = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    loss = _loss("huber_loss")
    options = TensorOptions(parameters=loss.numbers(delta=0.5))
    value = TensorLoss.apply(x, y, None, Request(loss, options))
    want = functional.huber_loss(x, y, delta=0.5)
    assert torch.equal(value, want)
    assert torch.equal(*(torch.autograd.grad(v, x)[0] for v in (value, want)))


def _arguments(function: Callable[..., object]) -> set[str]:
    """What the docstring's list of arguments names, and that of the function it refers to."""
    text = inspect.getdoc(function) or ""
    found = {
        name
        for line in re.findall(r"^    ((?:\w+, )*\w+):", text, re.MULTILINE)
        for name in line.split(", ")
    }
    other = re.search(r"rguments\s+as\s+in\s+:func:`(?:mbkern\.functional\.)?(\w+)`", text)
    if other:
        found |= _arguments(getattr(functional, other[1]))
    return (
        found
        | set(re.findall(r"``(\w+)[`=]", text))
        | set(re.findall(r"\w+", text.split("Args:")[0]))
    )


@pytest.mark.parametrize("name", functional.__all__)
def test_every_argument_is_explained(name: str) -> None:
    """Losses with a hinge had no list at all; the reduction of others was left out."""
    function = getattr(functional, name)
    if function.__module__.startswith("torch"):
        return
    named = set(inspect.signature(function).parameters)
    assert named <= _arguments(function)


@pytest.mark.parametrize("name", nn.__all__)
def test_a_module_names_its_constructors_arguments(name: str) -> None:
    """help() showed (*args, **kwargs)."""
    ours, torchs = getattr(nn, name), getattr(torch.nn, name, None)
    text = " ".join((inspect.getdoc(ours) or "").split())
    if "*args" not in str(inspect.signature(ours)):
        return
    shown = re.search(rf"``{name}\((.*?)\)``", text)
    assert shown
    if torchs is not None:
        parameters = list(inspect.signature(torchs).parameters.values())
    else:
        known = inspect.signature(ours._function).parameters
        parameters = [known[name] for name in ours._names()]
    assert shown[1].replace('"', "'") == ", ".join(f"{p.name}={p.default!r}" for p in parameters)
    made = ours(inplace=False, grad_scale=None, denominator=None, loss_dtype=None)
    for p in parameters:
        if p.name not in ("size_average", "reduce"):
            assert getattr(made, p.name) == p.default


@pytest.mark.parametrize("loss", mbkern.losses(), ids=lambda loss: loss.name)
def test_loss_and_grad_refuses_what_a_transform_wraps(loss: Loss) -> None:
    """Losses of elements raised torch's 'Cannot access data pointer'."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return mbkern.loss_and_grad(loss.name, *[x] * (len(loss.arguments) - len(loss.optional)))[0]

    with pytest.raises(NotImplementedError, match=r"is inside a torch\.func transform"):
        torch.func.vmap(call)(torch.rand(2, 3, 4))
