"""Every public loss refuses what is no tensor by the argument's name, and writes nothing."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

from mbkern import functional as F
from mbkern import nn

X = torch.linspace(0.1, 0.9, 12).reshape(3, 4)
Y, ONES = X.flip(0), torch.ones(3, 4)
CLASSES, PER_CLASS, PER_ITEM = torch.tensor([0, 2, 1]), torch.ones(4), torch.ones(3)

_ELEMENTS = {"input": X, "target": Y, "sample_weight": ONES}
_WEIGHED = {**_ELEMENTS, "weight": ONES}
_SIGNS = {"input": X, "target": ONES, "sample_weight": ONES}
_INDICES = {"input": X, "target": CLASSES, "weight": PER_CLASS, "sample_weight": PER_ITEM}
_PAIR = {"student": X, "teacher": Y, "target": CLASSES, "sample_weight": PER_ITEM}
#: Of each function its tensors, also those that may be left out.
CALLS: dict[str, dict[str, Tensor]] = {
    "binary_cross_entropy_with_logits": {**_WEIGHED, "pos_weight": PER_CLASS},
    "margin_ranking_loss": {"input1": X, "input2": Y, "target": ONES, "sample_weight": ONES},
    "gaussian_nll_loss": {**_ELEMENTS, "var": X},
    "multilabel_margin_loss": {
        "input": X, "target": torch.tensor([[0, 2, -1, 1]] * 3), "sample_weight": PER_ITEM,
    },
    "multilabel_soft_margin_loss": {
        "input": X, "target": Y, "weight": PER_CLASS, "sample_weight": PER_ITEM,
    },
    "dice_loss": {"input": X, "target": Y, "sample_weight": PER_ITEM},
    "cosine_embedding_loss": {
        "input1": X, "input2": Y, "target": PER_ITEM, "sample_weight": PER_ITEM,
    },
    "triplet_margin_loss": {
        "anchor": X, "positive": Y, "negative": X + 1, "sample_weight": PER_ITEM,
    },
    "entropy_with_logits": {"input": X, "target": CLASSES, "sample_weight": PER_ITEM},
    "info_nce_loss": {"similarity": X, "target": CLASSES, "sample_weight": PER_ITEM},
    "linear_cross_entropy": {
        "input": X, "linear_weight": torch.rand(5, 4), "target": CLASSES,
        "linear_bias": torch.rand(5), "weight": torch.ones(5), "sample_weight": PER_ITEM,
    },
}  # fmt: skip
for _names, _tensors in (
    ("half_squared_error smooth_l1_loss log_cosh_loss quantile_loss kl_div", _ELEMENTS),
    ("sigmoid_focal_loss poisson_nll_loss tweedie_nll_loss", _ELEMENTS),
    ("mse_loss l1_loss huber_loss binary_cross_entropy", _WEIGHED),
    ("soft_margin_loss hinge_embedding_loss hinge_loss squared_hinge_loss", _SIGNS),
    ("cross_entropy nll_loss multi_margin_loss softmax_focal_loss", _INDICES),
    ("kl_div_with_logits js_div_with_logits tv_distance_with_logits", _PAIR),
):
    CALLS.update((_name, _tensors) for _name in _names.split())
BAD: dict[str, Any] = {
    "None": None,
    "list": [[1.0] * 4] * 3,
    "float": 1.5,
    "int": 3,
    "bool": True,
    "complex": 1j,
    "str": "text",
    "array": X.numpy(),
    "scalar": np.float64(0.5),
    "module": torch.nn.Linear(2, 2),
}
#: Where a number is taken, as torch's formula takes it.
NUMBERS = {
    ("gaussian_nll_loss", "target"): "float int scalar",
    ("gaussian_nll_loss", "var"): "float int scalar",
    ("multilabel_soft_margin_loss", "target"): "float int",
}
ARGUMENTS = [(name, argument) for name, tensors in CALLS.items() for argument in tensors]


def _may_be_none(name: str, argument: str) -> bool:
    parameter = inspect.signature(getattr(F, name)).parameters.get(argument)
    return parameter is None or parameter.default is None  # None: among the common keywords


def test_all_are_here() -> None:
    assert set(CALLS) == set(F.__all__) - {"triplet_margin_with_distance_loss"}  # torch's own


@pytest.mark.parametrize("with_graph", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_what_is_no_tensor(name: str, argument: str, with_graph: bool) -> None:
    for kind, bad in BAD.items():
        given: dict[str, Any] = {k: t.clone() for k, t in CALLS[name].items()}
        next(iter(given.values())).requires_grad_(with_graph)
        before = {k: t.detach().clone() for k, t in given.items() if k != argument}
        given[argument] = bad
        if bad is None and _may_be_none(name, argument):
            getattr(F, name)(**given)
        elif kind in NUMBERS.get((name, argument), "").split():
            assert getattr(F, name)(**given).isfinite().all()
        else:
            kind_of = "None(Type)?" if bad is None else type(bad).__name__
            words = (
                rf"^mbkern: ({name}: )?{argument} must be a tensor( or a number)?, not {kind_of}"
            )
            with pytest.raises(TypeError, match=words):
                getattr(F, name)(**given)
        assert all(torch.equal(given[k], t) for k, t in before.items())


@pytest.mark.parametrize("name", [n for n in nn.__all__ if n != "TripletMarginWithDistanceLoss"])
def test_modules(name: str) -> None:
    of_head = (4, 5) if name == "LinearCrossEntropyLoss" else ()
    module = getattr(nn, name)(*of_head)
    parameters = inspect.signature(module.forward).parameters.values()
    required = sum(p.default is p.empty for p in parameters)
    with pytest.raises(TypeError, match=r"^mbkern: .* must be a tensor, not NoneType"):
        module(*[None] * required)


def test_numbers_are_as_in_torch() -> None:
    for number in (0, 0.25):
        mine, theirs = (f.gaussian_nll_loss(X, number, Y) for f in (F, T))
        torch.testing.assert_close(mine, theirs)
        mine, theirs = (f.multilabel_soft_margin_loss(X, number) for f in (F, T))
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(f.gaussian_nll_loss(X, Y, 0.5) for f in (F, T)))


def test_batchmean() -> None:
    with pytest.raises(TypeError, match=r"^mbkern: kl_div: input must be a tensor, not list"):
        F.kl_div([1.0], Y, reduction="batchmean")  # type: ignore[arg-type]


def test_targets_that_are_only_compared() -> None:
    """Torch takes a target that requires grad, and gives it no gradient."""
    for reduction in ("mean", "none"):
        x = X.clone().requires_grad_()
        signs = torch.where(X > 0.5, 1.0, -1.0).requires_grad_()
        found = [
            torch.autograd.grad(
                f.hinge_embedding_loss(x, signs, reduction=reduction).sum(), (x, signs),
                allow_unused=True,
            )
            for f in (F, T)
        ]  # fmt: skip
        torch.testing.assert_close(found[0][0], found[1][0])
        assert found[0][1] is None
        assert found[1][1] is None
    assert not F.hinge_embedding_loss(X, signs).requires_grad
    mine, theirs = (  # one tensor as both: the input keeps its gradient
        torch.autograd.grad(f.hinge_embedding_loss(x, x), x)[0] for f in (F, T)
    )
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy"])
def test_inplace_is_yes_or_no(name: str) -> None:
    for bad in ("False", None, [0], torch.tensor(0)):
        x = X.clone().requires_grad_() * 1
        with pytest.raises(TypeError, match=r"^mbkern: inplace must be True or False, not "):
            getattr(F, name)(x, CALLS[name]["target"], inplace=bad)
        assert torch.equal(x, X)
    getattr(F, name)(x, CALLS[name]["target"], inplace=np.True_).backward()
