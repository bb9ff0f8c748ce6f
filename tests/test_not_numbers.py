"""Accumulators and sums refuse numbers, parameters and states that are none, by their names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mbkern

NOT_NUMBERS: tuple[Any, ...] = ("text", "1", 1j, [1.0, 2.0], object(), torch.ones(2), np.ones(2))
_NO_NUMBER = r"must be a number, not (str|complex|list|object|Tensor|ndarray|NoneType)$"


@pytest.mark.parametrize("name", ["l1", "l2", "pre_scale", "max_norm"])
def test_of_an_accumulator(name: str) -> None:
    module = torch.nn.Linear(2, 2)
    for bad in NOT_NUMBERS if name == "max_norm" else (*NOT_NUMBERS, None):
        with pytest.raises(TypeError, match=f"^mbkern: {name} {_NO_NUMBER}"):
            mbkern.GradAccumulator(module, process_group=False, **{name: bad})
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


def test_parameters_seeds_and_names() -> None:
    for bad in (None, 3, 1.5, "text", np.array(1.0), object()):
        with pytest.raises(TypeError, match=r"^mbkern: parameters must be a module, tensors, "):
            mbkern.GradAccumulator(bad, process_group=False)
    module = torch.nn.Linear(2, 2)
    for bad in (None, 1.5, "1", [1], torch.tensor(0.5)):
        with pytest.raises(TypeError, match=r"^mbkern: seed must be an integer, not "):
            mbkern.GradAccumulator(module, seed=bad, process_group=False)  # type: ignore[arg-type]
    for bad in (None, 3, "text", [[]]):
        with pytest.raises(ValueError, match=r"^mbkern: denominators must be a sequence of differ"):
            mbkern.GradAccumulator(module, denominators=bad, process_group=False)  # type: ignore[arg-type]
    accumulator = mbkern.GradAccumulator(module, process_group=False)
    for bad in (None, 3, [1], torch.ones(2)):
        with pytest.raises(TypeError, match=r"^mbkern: the state of a GradAccumulator is a dict"):
            accumulator.load_state_dict(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["l1", "l2", "max_norm"])
def test_of_a_flush(name: str) -> None:
    grad, sums, parameter = torch.zeros(3), torch.ones(3), torch.ones(3)
    for bad in ("text", "1", 1j, object(), None if name != "max_norm" else "2", [None]):
        with pytest.raises(TypeError, match=f"^mbkern: {name} {_NO_NUMBER}"):
            mbkern.flush_(grad, sums, parameters=parameter, **{name: bad})
    assert torch.equal(grad, torch.zeros(3))


def test_of_a_sum() -> None:
    total = mbkern.LossSum().add(torch.ones(3))
    for bad in (None, 3, "text", [1], torch.ones(2)):
        with pytest.raises(TypeError, match=r"^mbkern: state must be a dict, not "):
            total.load_state_dict(bad)  # type: ignore[arg-type]
    for bad in (3, "text", [1], {}):
        with pytest.raises(TypeError, match=r"^mbkern: the state of a LossSum is a tensor, not "):
            total.load_state_dict({"state": bad})  # type: ignore[dict-item]
    for bad in ("float32", 3, float):
        with pytest.raises(TypeError, match=r"^mbkern: dtype must be a torch\.dtype, not "):
            total.value(dtype=bad)  # type: ignore[arg-type]
    assert total.value() == 3
