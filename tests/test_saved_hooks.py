"""Under hooks of saved tensors (checkpoints, offloading) a loss holds nothing else, and has the
same bits."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, REDUCTIONS, Case, Sample
from torch import Tensor
from torch.autograd import graph
from torch.utils import checkpoint
from torch_versions import tells_of_hooks

import mbkern.functional as F

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CASES_OF_EACH_KIND = [
    case for case in CASES if case.name in ("cross_entropy", "mse_loss", "kl_div_with_logits")
]


def _on_the_side(t: Tensor) -> Tensor:
    return t.clone()


def _plain(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


def _around(
    hooks: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Callable[..., Tensor]:
    def run(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        with hooks():
            return function(*tensors)

    return run


def _checkpointed(reentrant: bool) -> Callable[..., Tensor]:
    def run(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        result: Tensor = checkpoint.checkpoint(function, *tensors, use_reentrant=reentrant)
        return result

    return run


WAYS: dict[str, Callable[..., Tensor]] = {
    "the same tensor": _around(lambda: graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "copies": _around(lambda: graph.saved_tensors_hooks(_on_the_side, _on_the_side)),
    "save_on_cpu": _around(graph.save_on_cpu),
    "checkpoint": _checkpointed(False),
    "reentrant checkpoint": _checkpointed(True),
}
every_way = pytest.mark.parametrize("way", WAYS)


def gradients(
    way: Callable[..., Tensor],
    case: Case,
    sample: Sample,
    incoming: tuple[float, ...],
    **options: Any,
) -> list[Tensor]:
    """The loss, and for each incoming gradient those of all arguments; the graph is kept between.

    A sigmoid before the loss saves its result, which a gradient written over it would spoil.
    """
    sample, leaves = case.leaves(sample)
    fixed = case.tensors(sample)

    def function(*values: Tensor) -> Tensor:
        inner = [torch.sigmoid(value) for value in values]
        tensors = fixed | dict(zip(leaves, inner, strict=True))
        return case.function(**sample.options | tensors | options).sum()

    loss = way(function, *leaves.values())
    found = [loss.detach()]
    for k, factor in enumerate(incoming):
        for leaf in leaves.values():
            leaf.grad = None
        factor_of_loss = torch.tensor(factor, dtype=loss.dtype)
        loss.backward(factor_of_loss, retain_graph=k + 1 < len(incoming))
        found += [g.clone() for leaf in leaves.values() if (g := leaf.grad) is not None]
    return found


@every_case
def test_bits(case: Case) -> None:
    """Those of a call without hooks, for every option, whatever comes in."""
    way = WAYS["copies"]
    for variation, reduction in itertools.product(case.variations, REDUCTIONS):
        for dtype, hint in itertools.product(case.dtypes, (None, 3.0)):
            sample = case.sample((6, 70), dtype, variation)
            options = {"reduction": reduction, "grad_scale": hint}
            for factor in (1.0, 0.3):
                want = gradients(_plain, case, sample, (factor,), **options)
                got = gradients(way, case, sample, (factor,), **options)
                label = f"{variation.name} {dtype} {reduction} {hint} {factor}"
                assert len(got) == len(want) > 1, label
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a.nan_to_num(), b.nan_to_num()), label


@tells_of_hooks
@every_way
@pytest.mark.parametrize("case", CASES_OF_EACH_KIND, ids=lambda case: case.name)
def test_every_way(case: Case, way: str) -> None:
    """Also with the gradient in place, and for a graph that is kept."""
    kept = (1.0,) if way == "reentrant checkpoint" else (0.3, -2.0, 1.0)
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), REDUCTIONS):
        sample = case.sample((6, 70), dtype)
        for incoming, inplace in itertools.product({kept, kept[-1:]}, (False, True)):
            want = gradients(_plain, case, sample, incoming, reduction=reduction)
            if way == "reentrant checkpoint" and inplace:
                continue  # without hooks torch refuses what was saved before
            got = gradients(WAYS[way], case, sample, incoming, reduction=reduction, inplace=inplace)
            assert all(map(torch.equal, got, want)), (dtype, reduction, incoming, inplace)


@every_case
def test_what_backward_takes_as_it_was_in_forward(case: Case) -> None:
    """A hint and a denominator that have changed since."""
    for dtype in (torch.float32, torch.bfloat16):
        x, target = case.leaf(dtype)
        hint, denominator = torch.tensor(3.0), torch.tensor(5.0)
        options = {"grad_scale": hint, "denominator": denominator}
        want = torch.autograd.grad(case.function(x, target, **options) * 7, x)[0]
        with graph.saved_tensors_hooks(_on_the_side, _on_the_side):
            loss = case.function(x, target, **options)
        hint.fill_(100.0)
        denominator.fill_(100.0)
        assert torch.equal(torch.autograd.grad(loss * 7, x)[0], want)


@every_case
def test_many_incoming_gradients_and_second_derivatives(case: Case) -> None:
    def run(hooks: contextlib.AbstractContextManager[Any]) -> list[Tensor]:
        x, target = case.leaf(torch.float32)
        with hooks:
            loss = case.function(x, target)
        many = torch.tensor([1.0, 0.3, -2.0])
        keep = {"retain_graph": True}
        first = torch.autograd.grad(loss, x, many, is_grads_batched=True, **keep)[0]
        second = torch.autograd.grad(loss, x, create_graph=True)[0]
        return [first, second.detach()]

    got = run(graph.saved_tensors_hooks(_on_the_side, lambda t: t))
    want = run(contextlib.nullcontext())
    assert all(map(torch.equal, got, want))


def test_in_place_over_what_nobody_else_holds() -> None:
    """What a checkpoint computes again is overwritten, and not if another node has saved it."""
    if not hasattr(torch._C, "_storage_Use_Count"):
        pytest.skip("NOT CHECKED: this torch does not count the users of a storage")
    x = torch.randn(6, 70, requires_grad=True)
    target = torch.arange(6)
    for before, overwritten in ((lambda t: t * 2, True), (torch.exp, False)):
        logits_at: list[int] = []
        gradients_at: list[int] = []

        def function(
            x: Tensor, before: Any = before, at: Any = (logits_at, gradients_at)
        ) -> Tensor:
            logits = before(x)
            logits.register_hook(lambda g: at[1].append(g.data_ptr()))
            at[0].append(logits.data_ptr())
            return F.cross_entropy(logits, target, inplace=True)

        with checkpoint.set_checkpoint_early_stop(False):
            checkpoint.checkpoint(function, x, use_reentrant=False).backward()
        assert (gradients_at[0] == logits_at[-1]) is overwritten


HELD = """
import itertools, torch
from mbkern import functional
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def run(name, shape, inplace):
    x = torch.zeros(shape, requires_grad=True)
    target = torch.ones(shape)
    if name == "cross_entropy":
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    function = getattr(functional, name)
    before = held()
    loss = checkpoint(lambda x: function(x * 2, target, inplace=inplace), x, use_reentrant=False)
    after = held()
    loss.backward()
    return after - before

names = ("cross_entropy", "mse_loss", "kl_div_with_logits")
shapes = ((1000, 4000), (1, 2, 2000, 1000))
for name, shape, inplace in itertools.product(names, shapes, (False, True)):
    run(name, shape[:1] + (3,) * (len(shape) - 1), inplace)
    print(name, shape, inplace, run(name, shape, inplace), sep="; ")
"""


@tells_of_hooks
def test_nothing_is_held_until_backward() -> None:
    """By a checkpoint, whose purpose that is: not the gradient of 16 MB, nor numbers an item."""
    command = [sys.executable, "-c", HELD]
    # What is freed goes back to the system at once, or it could not be seen.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    for line in lines:
        assert int(line.split(";")[-1]) < 4_000_000, line
