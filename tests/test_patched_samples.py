"""torch's own samples of every loss that it shares with mbkern, run inside mbkern.patched()."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, check
from patched_inputs import OPS, every_way, outcome
from torch import Tensor
from torch.testing._internal.common_modules import module_db

from mbkern import patched
from mbkern._patched_calls import entries

pytestmark = [
    pytest.mark.usefixtures("one_thread", "patches_taken_back"),
    pytest.mark.filterwarnings("ignore:Using a target size", "ignore:size_average and reduce"),
    pytest.mark.filterwarnings("ignore:reduction. .mean. divides"),  # of kl_div
]

#: By the names of their functions; torch has no samples of the others.
MODULES = {
    info.module_cls.__name__.replace("Loss", "").lower(): info
    for info in module_db
    if info.module_cls.__name__.endswith("Loss")
}
SHORT = {
    "binary_cross_entropy": "bce", "binary_cross_entropy_with_logits": "bcewithlogits",
    "kl_div": "kldiv",
}  # fmt: skip
#: The fused head's samples are those of test_linear_torch.py.
NAMES = [entry.name for entry in entries() if entry.name != "linear_cross_entropy"]


@dataclass(frozen=True)
class Call:
    """Arguments of a function of that name, or of a module."""

    name: str
    module: type[torch.nn.Module] | None
    made_of: tuple[tuple[Any, ...], dict[str, Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        """The same with floating tensors of another dtype."""
        positional, named = self.made_of
        return replace(
            self,
            made_of=(tuple(cast(v, dtype) for v in positional), cast_all(named, dtype)),
            args=tuple(cast(v, dtype) for v in self.args),
            kwargs=cast_all(self.kwargs, dtype),
        )

    def __str__(self) -> str:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in self.args]
        return f"{self.module or self.name} {self.made_of} {shapes} {self.kwargs}"


def cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    if not value.is_floating_point():
        return copy
    return copy.to(dtype).requires_grad_(value.requires_grad)


def cast_all(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: cast(value, dtype) for name, value in values.items()}


def calls(name: str) -> Iterator[Call]:
    """In fp64 and fp32: some of torch's generators know no other dtype."""
    torch.manual_seed(0)
    random.seed(0)
    if name in OPS:
        for sample in OPS[name].sample_inputs("cpu", torch.float64, True):
            yield Call(name, None, ((), {}), (sample.input, *sample.args), sample.kwargs)
    info = MODULES.get(SHORT.get(name, name.replace("_loss", "").replace("_", "")))
    if info is None:
        return
    for entry in info.module_inputs_func(info, "cpu", torch.float32, True, training=True):
        make, call = entry.constructor_input, entry.forward_input
        yield Call(name, info.module_cls, (make.args, make.kwargs), call.args, call.kwargs)


def differentiated(call: Call) -> list[Tensor | None]:
    """The loss, and gradients from an incoming gradient of small integers."""
    function: Callable[..., Tensor] = getattr(F, call.name)
    if call.module is not None:
        positional, named = call.made_of
        function = call.module(*positional, **named)
    loss = function(*call.args, **call.kwargs)
    tensors = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)]
    if loss.requires_grad:
        incoming = torch.arange(loss.numel()).reshape(loss.shape) % 5 - 1
        loss.backward(incoming.to(loss.dtype) + (loss.dim() == 0) * 2)
    return [loss.detach(), *(t.grad for t in tensors)]


def largest(call: Call) -> float:
    """Of the numbers that a loss adds and subtracts."""
    numbers = [a.detach() for a in call.args if isinstance(a, Tensor) and a.numel()]
    tops = [a.nan_to_num(0, 0, 0).abs().max().item() for a in numbers]
    if call.name == "gaussian_nll_loss" and len(numbers) > 2:  # squares over squared variances
        return float(((tops[0] + tops[1]) / numbers[2].min() + 1) ** 2)
    return 2 + max(tops, default=0.0)


def compare(call: Call, got: list[Any], want: list[Any], stock: list[Any]) -> None:
    for k, (g, w, t) in enumerate(zip(got, want, stock, strict=True)):
        assert (g is None) == (w is None), f"{call}: result {k} is {g}"
        if g is None:
            continue
        by_target = k == 2  # a gradient
        if call.name in ("poisson_nll_loss", "kl_div") and by_target:
            # NaN times 0, or 0 * inf: see the lattice of test_special_values.py
            odd = w.isnan() | g.isnan()
            g, w, t = (None if v is None else v.masked_fill(odd, 0) for v in (g, w, t))
        if call.name == "binary_cross_entropy" and by_target:
            t = None  # a difference of logarithms: 1.8 ulp, where torch has 1.4
        check(g, w, t, f"{call} {g.dtype}: result {k}", largest(call))


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, dtype: torch.dtype, mode: bool) -> None:
    """What mbkern computes has torch's dtypes and at most its errors; the rest is torch's bits."""
    taken = 0
    for given in calls(name):
        call = given.to(dtype)
        theirs = outcome(differentiated, call.to(dtype))
        with patched(mode=mode, report=True) as report:
            got = outcome(differentiated, call.to(dtype))
        if not report.taken:
            assert_same(got, theirs, str(call))
            continue
        taken += 1
        assert isinstance(got, list), f"{call}: {got}"
        lacks = isinstance(theirs, tuple) and "not implemented for" in theirs[1]
        assert lacks or isinstance(theirs, list), f"{call}: torch {theirs}"
        stock = [None] * len(got) if lacks else theirs
        compare(call, got, differentiated(call.to(torch.float64)), stock)
    assert taken >= 2, f"{taken} calls"


def assert_same(got: Any, want: Any, label: str) -> None:
    assert type(got) is type(want), f"{label}: {got}, torch {want}"
    if isinstance(want, tuple):
        assert got == want, label
        return
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None), label
        if g is not None:
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True, msg=label)
