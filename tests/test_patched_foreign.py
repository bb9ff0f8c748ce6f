"""mbkern.patched() beside other people's functions, modes and subclasses in the same places."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patched_inputs import ORIGINALS, X, Y, every_way, in_a_thread, run_by
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mbkern import _patched, _patched_calls
from mbkern._patched import patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread", "patches_taken_back")

THERE_BEFORE = """
import functools, torch, torch.nn.functional as F
x, y = torch.randn(6, 5), torch.randn(6, 5)
own = F.mse_loss

@functools.wraps(own)
def theirs(*args, **kwargs):
    return own(*args, **kwargs) * 1000

F.mse_loss = theirs
import mbkern
want = F.mse_loss(x, y)
with mbkern.patched(report=True) as report:
    assert F.mse_loss is theirs
    assert torch.equal(F.mse_loss(x, y), want)
    F.l1_loss(x, y)
    F.mse_loss = own
    with mbkern.patched():
        F.mse_loss(x, y)
    F.mse_loss(x, y)
assert report.taken == {"l1_loss": 1, "mse_loss": 2}, str(report)
assert F.mse_loss is own
"""


def test_functions_that_were_there_before_the_first_block() -> None:
    """They are nobody's to replace; torch's own is taken once it is back."""
    subprocess.run([sys.executable, "-c", THERE_BEFORE], check=True, timeout=300)


def test_functions_that_come_and_go_in_between() -> None:
    def by() -> str:
        return run_by(lambda *a: F.mse_loss(*a), X, Y)

    own = F.mse_loss
    patch()
    try:
        wrapper = F.mse_loss
        F.mse_loss = lambda *a: wrapper(*a) * 1
        with patched():
            F.mse_loss = own  # restored to what it was before all
            assert by() == "torch"
        with patched():
            assert by() == "mbkern"
    finally:
        unpatch()
    assert F.mse_loss is own
    F.mse_loss = wrapper  # restored late, to what it was inside
    assert by() == "torch"
    with patched():
        assert by() == "mbkern"
    assert F.mse_loss is own


def test_a_mode_runs_other_peoples_functions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, called by theirs, names theirs to a mode."""
    own = ORIGINALS["mse_loss"]
    monkeypatch.setattr(F, "mse_loss", lambda *a: own(*a) * 1000)
    want = F.mse_loss(X, Y)
    with patched(mode=True, report=True) as report:
        torch.testing.assert_close(F.mse_loss(X, Y), want)
    assert report.taken == {"mse_loss": 1}


class Told(Tensor):
    """Says what it was asked."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, len(args), kwargs


@pytest.mark.parametrize("name", [entry.name for entry in _patched_calls.entries()])
@every_way
def test_overrides_are_told_all_options(name: str, mode: bool) -> None:
    """As torch's functions tell them, however they were called."""
    entry = next(entry for entry in _patched_calls.entries() if entry.name == name)
    args = (X.as_subclass(Told), *[Y] * (entry.tensors - 1))
    want = getattr(F, name)(*args, reduction="sum")

    def told() -> Any:
        return getattr(F, name)(*args, reduction="sum")

    with patched(mode=mode):
        for function, count, options in (told(), in_a_thread(told)):
            if name == "l1_loss":  # torch's own does not tell its weight
                options.pop("weight", None)
            assert (function, count, options) == want
    with patched(mode=mode), pytest.raises(TypeError, match="unexpected keyword"):
        getattr(F, name)(*args, nothing=1)


@every_way
def test_modes_are_asked_first(mode: bool) -> None:
    """Inside the block and around it; a default device has nothing to say."""

    class Theirs(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is ORIGINALS["mse_loss"]:
                return torch.tensor(42.0)
            return func(*args, **(kwargs or {}))

    with patched(mode=mode, report=True) as report, Theirs():
        assert F.mse_loss(X, Y) == 42
        torch.testing.assert_close(F.l1_loss(X, Y), (X - Y).abs().mean())
    assert not report.taken or mode
    with Theirs(), patched(mode=mode, report=True) as report:
        assert F.mse_loss(X, Y) == 42
    assert report.passed_on == {("mse_loss", "a function mode"): 1}
    with torch.device("cpu"), patched(mode=mode, report=True) as report:
        F.mse_loss(X, Y)
    assert report.taken == {"mse_loss": 1}


def test_a_block_inside_itself_counts_a_call_once() -> None:
    block = patched(report=True)

    @block
    def function(depth: int) -> Tensor:
        return function(depth - 1) if depth else F.mse_loss(X, Y)

    function(3)
    assert block.report is not None
    assert block.report.taken == {"mse_loss": 1}


def test_what_runs_after_the_block_is_not_decorated() -> None:
    def generator() -> Any:
        yield 1

    async def coroutine() -> None:
        pass

    async def both() -> Any:
        yield 1

    for function in (generator, coroutine, both, dict):
        with pytest.raises(TypeError, match=r"^mbkern: patched\(\) decorates functions, not"):
            patched()(function)


def test_left_in_a_thread_that_has_entered_another_one() -> None:
    block = patched(report=True)
    with block:

        def leave() -> None:
            with patched():
                block.__exit__(None, None, None)

        kind, text = in_a_thread(leave)
        assert kind is RuntimeError
        assert "had not entered it" in text


def test_autocast_that_torch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA torch raises for probabilities under autocast, and says what to do."""
    monkeypatch.setattr(_patched_calls, "has_kernels", lambda tensor: True)
    entry = next(e for e in _patched_calls.entries() if e.name == "binary_cross_entropy")
    with FakeTensorMode():
        args = (torch.empty(3, device="cuda"), torch.empty(3, device="cuda"))
    assert _patched_calls.refusal(entry, args, {}) is None
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert "torch refuses" in str(_patched_calls.refusal(entry, args, {}))
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert _patched._Process.users == 0
