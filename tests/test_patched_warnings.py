"""kl_div warns of its mean in torch's words, from torch's place, as often as torch's does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import nn

import mbkern
import mbkern.functional as F

pytestmark = pytest.mark.cpu
X, T = torch.randn(3, 4), torch.rand(3, 4)


def told(call: Callable[[], Any], action: str = "always") -> list[tuple[str, type, str, int]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter(action)  # type: ignore[arg-type]
        call()
    return [(str(w.message), w.category, w.filename, w.lineno) for w in found]


def functions(reduction: str) -> list[Callable[[], Any]]:
    module = nn.KLDivLoss(reduction=reduction)
    return [
        lambda: torch_functional.kl_div(X, T, reduction=reduction),
        lambda: torch_functional.kl_div(input=X, target=T, reduction=reduction),
        lambda: module(X, T),
    ]


def inside(call: Callable[[], Any]) -> list[tuple[str, type, str, int]]:
    with mbkern.patched(report=True) as report:
        found = told(call)
    assert report is not None
    assert report.taken["kl_div"] == 1
    return found


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_patched_warns_as_torch_does(reduction: str) -> None:
    for call in functions(reduction):
        wanted = told(call)
        assert len(wanted) == (reduction == "mean")
        assert inside(call) == wanted


def test_so_does_a_mode() -> None:
    call = functions("mean")[0]
    with mbkern.patched(mode=True):
        found = told(call)
    assert [w[:2] for w in found] == [w[:2] for w in told(call)]


def test_so_does_our_own_function_and_module() -> None:
    (wanted,) = told(functions("mean")[0])
    (found,) = told(lambda: F.kl_div(X, T))
    assert found[:2] == wanted[:2]
    assert found[2] == __file__
    (found,) = told(lambda: mbkern.nn.KLDivLoss()(X, T))
    assert found[:2] == wanted[:2]


def test_once_for_each_place_where_python_says_so() -> None:
    def calls() -> None:
        for _ in range(3):
            torch_functional.kl_div(X, T)

    with mbkern.patched():
        assert len(told(calls, "default")) == 1


def test_nothing_is_said_of_what_is_no_such_mean() -> None:
    for options in ({"denominator": 3.0}, {"reduction": "batchmean"}, {"reduction": "sum"}):
        assert not told(lambda options=options: F.kl_div(X, T, **options))
    (legacy,) = told(lambda: F.kl_div(X, T, size_average=True))
    assert "size_average" in legacy[0]
    assert not told(lambda: mbkern.loss_and_grad("kl_div", X, T))


def test_a_compiled_call_stays_one_graph() -> None:
    compiled = torch.compile(F.kl_div, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X, T), F.kl_div(X, T, denominator=X.numel()))
