"""inspect.signature, and with it help() and editors, sees what a module's constructor takes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

import mbkern.nn

pytestmark = pytest.mark.cpu
#: All but torch's own that is offered under its name.
MODULES = [
    module
    for module in (getattr(mbkern.nn, name) for name in mbkern.nn.__all__)
    if module.__module__.startswith("mbkern")
]
EXTRAS = ["inplace", "grad_scale", "denominator", "loss_dtype"]
MADE_WITH: dict[str, dict[str, Any]] = {
    "LinearCrossEntropyLoss": {"in_features": 3, "num_classes": 5},
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_parameter_has_its_name_and_default(module: type[torch.nn.Module]) -> None:
    parameters = inspect.signature(module).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert not [p for p in parameters.values() if p.kind in variadic]
    required = {n for n, p in parameters.items() if p.default is p.empty}
    made_with = MADE_WITH.get(module.__name__, {})
    assert required == made_with.keys()
    plain = module(**made_with)
    # The defaults are those that nothing given means; torch's deprecated words are no attributes.
    whole = module(
        **made_with, **{n: p.default for n, p in parameters.items() if n not in required}
    )
    for name in parameters.keys() - {
        "size_average",
        "reduce",
        "in_features",
        "bias",
        "device",
        "dtype",
    }:
        assert getattr(whole, name) == getattr(plain, name), name
        assert name in required or getattr(plain, name) == parameters[name].default, name
    assert repr(whole) == repr(plain)
    assert whole.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_torchs_arguments_come_first_in_torchs_order(module: type[torch.nn.Module]) -> None:
    torchs = getattr(torch.nn, module.__name__, None)
    if torchs is None or module.__name__ == "LinearCrossEntropyLoss":
        return
    theirs = [(p.name, p.default) for p in inspect.signature(torchs).parameters.values()]
    ours = [(p.name, p.default) for p in inspect.signature(module).parameters.values()]
    assert ours[: len(theirs)] == theirs
    assert {name for name, _ in ours[len(theirs) :]} >= set(EXTRAS)


def test_own_losses_have_their_functions_order() -> None:
    names = list(inspect.signature(mbkern.nn.SoftmaxFocalLoss).parameters)
    assert names == ["gamma", "weight", "ignore_index", "reduction", "temperature", *EXTRAS]
    assert inspect.signature(mbkern.nn.KLDivWithLogits).parameters["direction"].default == "forward"


def test_instances_and_subclasses_have_their_own() -> None:
    """A call's is torch's; a constructor of the user's is the user's."""

    class Scaled(mbkern.nn.MSELoss):
        def __init__(self, factor: float) -> None:
            super().__init__(reduction="sum")
            self.factor = factor

    class Same(mbkern.nn.MSELoss):
        pass

    assert list(inspect.signature(Scaled).parameters) == ["factor"]
    assert inspect.signature(Same) == inspect.signature(mbkern.nn.MSELoss)
    assert inspect.signature(mbkern.nn.MSELoss()) == inspect.signature(torch.nn.MSELoss())
    assert not hasattr(mbkern.nn.MSELoss(), "__signature__")
    assert Scaled(2.0).reduction == "sum"


def test_copies_and_pickles() -> None:
    module = mbkern.nn.HuberLoss(delta=0.5, inplace=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert (other.delta, other.reduction, vars(other).keys()) == (
            0.5,
            "mean",
            vars(module).keys(),
        )
