"""Options of losses that are no numbers, integers or words are refused by their names."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from test_not_tensors_everywhere import CALLS

from mbkern import functional as F

BAD: tuple[Any, ...] = (
    None, "text", "1", 1j, [1.0], object(), torch.float32, torch.ones(2), np.ones(2),
)  # fmt: skip
#: What is asked for its truth only, or is an object of torch's.
_SKIPPED = {
    "size_average", "reduce", "extras", "options", "process_group", "return_stats",
    "split_invariant", "accumulate_into", "inplace",
}  # fmt: skip
#: What may be left out, or may be a word or a tensor.
_TAKEN = {
    "ignore_index": (None,), "softcap": (None,), "denominator": (None,), "grad_scale": (None,),
    "logit_scale": (None,), "chunk_bytes": (None,), "num_valid": (None,), "filter_eps": (None,),
    "loss_dtype": (None, torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_options(name: str) -> None:
    function, tensors = getattr(F, name), CALLS[name]
    parameters = [p for p in inspect.signature(function).parameters if p not in tensors]
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    for option in {*parameters, "denominator", "loss_dtype"} - _SKIPPED - {"pos_weight"}:
        for bad in BAD:
            if any(bad is taken for taken in _TAKEN.get(option, ())):
                continue
            if option in ("beta", "p", "filter_eps", "reduction") and hasattr(bad, "shape"):
                continue  # compared first, which NumPy and torch refuse in their own words
            given: dict[str, Any] = {k: t.clone() for k, t in tensors.items()}
            given[option] = bad
            if bad is None and isinstance(defaults.get(option), bool):
                continue  # is no, as in torch
            if option == "grad_scale":  # a hint, which is not looked at without a graph
                next(iter(given.values())).requires_grad_()
            with pytest.raises((TypeError, ValueError), match=r"^mbkern: "):
                function(**given)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_other_losses(name: str) -> None:
    """Refused, not ignored; also those by whose names the losses call each other."""
    function, tensors = getattr(F, name), CALLS[name]
    own = inspect.signature(function).parameters
    for other in ("weight", "ignore_index", "size_average", "reduce", "loss", "tensors", "sizes"):
        if other not in own:
            with pytest.raises(TypeError, match=f"has no argument '{other}'|unexpected keyword"):
                function(**tensors, **{other: None})


@pytest.mark.parametrize("name", ["mse_loss", "nll_loss", "kl_div", "cross_entropy"])
def test_the_warning_of_deprecated_arguments_is_of_the_callers_line(name: str) -> None:
    x = torch.randn(3, 4).log_softmax(1)
    target = torch.tensor([0, 3, 1]) if name in ("nll_loss", "cross_entropy") else x.exp()
    with pytest.warns(UserWarning, match="size_average and reduce") as told:
        getattr(F, name)(x, target, size_average=False)
    assert [warning.filename for warning in told] == [__file__]
