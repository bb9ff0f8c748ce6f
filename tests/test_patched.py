"""torch's functions and modules run here: where the switch is on, and what is counted."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, Sample
from patched_inputs import (
    ARGUMENTS,
    ORIGINALS,
    OURS,
    T,
    X,
    Y,
    every_loss,
    every_way,
    in_a_thread,
    run_by,
)
from torch import Tensor
from torch.nn.functional import mse_loss as imported_mse_loss
from torch.utils import checkpoint
from torch_versions import tells_of_hooks

import mbkern
from mbkern._patched import PatchReport, patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread", "patches_taken_back")


# ---- where it is on -----------------------------------------------------------------------------


def test_every_common_loss_is_taken_in() -> None:
    functions = dict(vars(F))
    with patched():
        replaced = {name for name, value in vars(F).items() if value is not functions[name]}
    names = {"linear_cross_entropy", *(loss.name for loss in mbkern.losses())}
    assert replaced == {name for name in names if hasattr(F, name)}
    assert replaced >= ORIGINALS.keys()


@every_way
@every_loss
def test_functions_and_modules(name: str, mode: bool) -> None:
    """Ours inside, bit by bit, with gradients; torch's before and after."""
    args = ARGUMENTS[name]
    module = {"cross_entropy": torch.nn.CrossEntropyLoss, "mse_loss": torch.nn.MSELoss}[name]()

    def live(*args: Tensor) -> Tensor:
        result: Tensor = getattr(F, name)(*args)
        return result

    assert run_by(live, *args) == run_by(module, *args) == "torch"
    with patched(mode=mode) as report:
        assert report is None
        for function in (live, module):
            assert run_by(function, *args) == "mbkern"
            grads = []
            for call in (function, OURS[name]):
                leaf = args[0].clone().requires_grad_()
                loss = call(leaf, *args[1:])
                loss.backward()
                grads.append((loss.detach(), leaf.grad))
            assert all(map(torch.equal, *grads))
    assert run_by(live, *args) == run_by(module, *args) == "torch"


@every_loss
def test_mode_catches_names_imported_beforehand(name: str) -> None:
    args = ARGUMENTS[name]
    with patched():
        assert run_by(ORIGINALS[name], *args) == "torch"
    with patched(mode=True):
        assert getattr(F, name) is ORIGINALS[name]
        assert run_by(ORIGINALS[name], *args) == "mbkern"
        assert torch.equal(torch.neg(X), -X)
    assert run_by(ORIGINALS[name], *args) == "torch"


@every_way
def test_the_weight_of_l1_loss(mode: bool) -> None:
    """Inside a function mode torch's function loses it."""
    weight = torch.rand(X.shape)
    want = F.l1_loss(X, X * 0.5, weight=weight)
    with patched(mode=mode, report=True) as report:
        got = F.l1_loss(X, X * 0.5, weight=weight)
    assert report.taken == {"l1_loss": 1}
    torch.testing.assert_close(got, want)
    with patched(mode=mode, report=True) as report, patched(mode=True):  # one that torch computes
        got = F.l1_loss(X.double(), X * 0.5, weight=weight)
    assert not report.taken
    torch.testing.assert_close(got, F.l1_loss(X.double(), X * 0.5, weight=weight))


@every_way
def test_only_this_thread(mode: bool) -> None:
    def probe() -> str:
        return run_by(lambda *a: F.cross_entropy(*a), X, T)

    with patched(mode=mode):
        assert in_a_thread(probe) == "torch"
        assert probe() == "mbkern"

    def inside() -> tuple[str, str]:
        with patched(mode=mode):
            return probe(), in_a_thread(probe)

    with patched():
        assert in_a_thread(inside) == ("mbkern", "torch")
        assert probe() == "mbkern"
    assert probe() == "torch"


def test_other_threads_overlap() -> None:
    """The wrappers stay until the last of many threads has left, and calls are right meanwhile."""
    wrong: list[Any] = []

    def work(inside: bool) -> None:
        for _ in range(100):
            if inside:
                with patched():
                    found = run_by(lambda *a: F.mse_loss(*a), X, Y)
            else:
                found = run_by(lambda *a: F.mse_loss(*a), X, Y)
            if found != ("mbkern" if inside else "torch"):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(k % 2 == 0,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_patch_is_counted() -> None:
    def probe() -> str:
        return run_by(lambda *a: F.cross_entropy(*a), X, T)

    with pytest.raises(RuntimeError, match=r"^mbkern: unpatch\(\) without a patch\(\)"):
        unpatch()
    patch()
    try:
        patch()
        assert probe() == in_a_thread(probe) == "mbkern"
        unpatch()
        with patched():
            assert probe() == "mbkern"
        assert probe() == in_a_thread(probe) == "mbkern"
        with patched():
            unpatch()
            try:
                assert probe() == "mbkern"
                assert in_a_thread(probe) == "torch"
                with pytest.raises(RuntimeError, match="unpatch"):
                    unpatch()
            finally:
                patch()
    finally:
        unpatch()
    assert probe() == "torch"


@pytest.mark.cpu
@every_way
def test_nested_and_left_by_exceptions(mode: bool) -> None:
    block = patched(mode=mode)

    def probe() -> str:
        return run_by(lambda *a: F.cross_entropy(*a), X, T)

    def fail() -> None:
        with block, block:
            assert probe() == "mbkern"
            raise ZeroDivisionError

    with block:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert probe() == "mbkern"
    assert probe() == "torch"
    with patched(mode=not mode):
        with block, pytest.raises(IndexError):
            F.cross_entropy(X, T + 37)
        assert probe() == "mbkern"


@every_way
def test_left_where_it_was_not_entered(mode: bool) -> None:
    block = patched(mode=mode)
    with block:
        kind, text = in_a_thread(lambda: block.__exit__(None, None, None))
        assert kind is RuntimeError
        assert "a thread that had not entered it" in text


@every_way
def test_decorator(mode: bool) -> None:
    @patched(mode=mode)
    def probe(depth: int) -> str:
        return probe(depth - 1) if depth else run_by(lambda *a: F.cross_entropy(*a), X, T)

    assert probe(0) == probe(2) == "mbkern"
    assert run_by(lambda *a: F.cross_entropy(*a), X, T) == "torch"


def _checkpointed(leaf: Tensor) -> Tensor:
    result: Tensor = checkpoint.checkpoint(
        lambda x: F.cross_entropy(x * 2, T), leaf, use_reentrant=False
    )
    return result


def test_checkpoint() -> None:
    """With patch, backward may run in any thread; with patched, inside the block in its own."""
    leaf = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(mbkern.functional.cross_entropy(leaf * 2, T), leaf)
    patch()
    try:
        assert in_a_thread(_checkpointed(leaf).backward) is None
    finally:
        unpatch()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, want)
    leaf.grad = None
    with patched():
        _checkpointed(leaf).backward()
    assert torch.equal(leaf.grad, want)


@tells_of_hooks
@every_way
def test_checkpoint_whose_backward_is_in_another_thread(mode: bool) -> None:
    leaf = X.clone().requires_grad_()
    with patched(mode=mode):
        error, _ = in_a_thread(_checkpointed(leaf).backward)
    assert error is checkpoint.CheckpointError
    assert leaf.grad is None


@tells_of_hooks
@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")  # of kl_div
@pytest.mark.parametrize("case", [c for c in CASES if c.torch], ids=lambda case: case.name)
def test_checkpoint_whose_backward_is_on_the_other_side(case: Case) -> None:
    """It raises, also where torch's function saves tensors of the same shapes as ours."""
    for variation in (v for v in case.variations if v.torch):
        sample, _ = case.leaves(case.sample((6, 70), torch.float32, variation))
        if case.third is not None:
            sample.options.setdefault(case.arguments[2], case.third(sample.input.detach()))

        def function(input: Tensor, sample: Sample = sample) -> Tensor:
            result: Tensor = getattr(F, case.name)(input * 1, sample.target, **sample.options)
            return result.sum()

        with patched():
            before = checkpoint.checkpoint(function, sample.input, use_reentrant=False)
        with pytest.raises(checkpoint.CheckpointError):
            before.backward()
        after = checkpoint.checkpoint(function, sample.input, use_reentrant=False)
        with patched(), pytest.raises(checkpoint.CheckpointError):
            after.backward()
        assert sample.input.grad is None, variation.name


def test_somebody_elses_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any) -> str:
        return "theirs"

    with monkeypatch.context() as m:
        m.setattr(F, "mse_loss", theirs)
        with patched():
            assert F.mse_loss(X, Y) == "theirs"
            assert run_by(lambda *a: F.cross_entropy(*a), X, T) == "mbkern"
        assert F.mse_loss is theirs
    with patched():
        wrapper = F.mse_loss
        F.mse_loss = theirs
    assert F.mse_loss is theirs
    F.mse_loss = imported_mse_loss
    assert run_by(wrapper, X, Y) == "torch"


# ---- reports ------------------------------------------------------------------------------------


def test_report() -> None:
    with patched(report=True) as outer:
        F.cross_entropy(X, T)
        with patched(mode=True, report=True) as inner:
            F.cross_entropy(X, T)
            imported_mse_loss(X, Y)
            with patched():
                F.cross_entropy(X, T.byte())
        F.mse_loss(X, Y, reduction="sum")
    F.mse_loss(X, Y)
    assert isinstance(outer, PatchReport)
    assert isinstance(inner, PatchReport)
    assert inner.taken == {"cross_entropy": 1, "mse_loss": 1}
    assert outer.taken == {"cross_entropy": 2, "mse_loss": 2}
    assert inner.passed_on == outer.passed_on == {("cross_entropy", "target is uint8"): 1}
    assert str(outer).splitlines() == [
        "loss           calls  computed by",
        "cross_entropy      2  mbkern",
        "mse_loss           2  mbkern",
        "cross_entropy      1  torch: target is uint8",
    ]
    assert str(PatchReport()) == "loss  calls  computed by"


@every_way
def test_no_recursion(mode: bool) -> None:
    """One call is one call, also where formulas of torch operations stand in for the kernels."""
    with patched(mode=mode, report=True) as report:
        for name, (x, y) in ARGUMENTS.items():
            function = getattr(F, name)
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(function(leaf, y), leaf, create_graph=True)
            grad.square().sum().backward()
            torch.func.jvp(functools.partial(function, target=y), (x,), (x,))
    assert report.taken == {"cross_entropy": 2, "mse_loss": 2}
    assert not report.passed_on
