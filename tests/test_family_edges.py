"""The family of losses at its edges: rows without columns, parameters that are not on offer, items
of several dimensions, weights that are broadcast."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from cases import CASES
from row_cases import ROW_CASES
from torch import Tensor

import mbkern
import mbkern.functional as F

every_wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
TWO_ENDS = ("linear_cross_entropy",)  # test_linear_*.py
OF_OTHERS = ("triplet_margin_with_distance_loss",)  # torch's path


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_every_function_is_in_a_list_of_cases() -> None:
    """Also one that is another loss in disguise, which ``mbkern.losses()`` does not name."""
    listed = {case.name for case in (*CASES, *ROW_CASES)}
    assert listed == set(F.__all__) - {*TWO_ENDS, *OF_OTHERS}


@every_wide
def test_rows_without_columns(dtype: torch.dtype, isa: str) -> None:
    """A sum of nothing is 0, whatever was in memory."""
    for columns in (5, 7):  # leaves sums behind
        x = _random(40, columns).to(dtype)
        F.triplet_margin_loss(x, x * 2, x * 3)
    none = torch.empty(3, 0, dtype=dtype)
    losses = {
        "dice_loss": ((none, none), [0.0] * 3),
        "triplet_margin_loss": ((none, none, none), [1.0] * 3),
        "cosine_embedding_loss": ((none, none, torch.ones(3, dtype=dtype)), [1.0] * 3),
        "multilabel_soft_margin_loss": ((none, none), [float("nan")] * 3),
    }
    for name, (tensors, want) in losses.items():
        for got in (
            getattr(F, name)(*tensors, reduction="none"),
            mbkern.loss_and_grad(name, *tensors, reduction="none")[0],
        ):
            torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), equal_nan=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multi_margin_loss", {"p": 1.5}, "p must be 1 or 2, not 1.5"),
        ("multi_margin_loss", {"p": 3}, "p must be 1 or 2, not 3"),
        ("tweedie_nll_loss", {"power": 0.5}, "power must be 0 or at least 1, not 0.5"),
        ("kl_div_with_logits", {"direction": "back"}, "'forward' or 'reverse', not 'back'"),
    ],
)
def test_parameters_that_are_not_on_offer(name: str, options: Any, message: str) -> None:
    """Refused by both entries: a kernel would take them for something else."""
    x, other = _random(4, 5), _random(4, 5).abs()
    if name == "multi_margin_loss":
        other = torch.arange(4)
    for call in (getattr(F, name), lambda *a, **o: mbkern.loss_and_grad(name, *a, **o)):
        with pytest.raises(ValueError, match=message):
            call(x, other, **options)


def test_words_are_options_of_both_entries() -> None:
    x, y = _random(4, 5), _random(4, 5).abs()
    want = F.kl_div_with_logits(x, y, direction="reverse")
    assert want != F.kl_div_with_logits(x, y)
    got, _ = mbkern.loss_and_grad("kl_div_with_logits", x, y, direction="reverse")
    assert torch.equal(got, want)
    (loss,) = (loss for loss in mbkern.losses() if loss.name == "kl_div_with_logits")
    assert loss.named(loss.numbers(direction="reverse"))["direction"] == "reverse"
    assert pickle.loads(pickle.dumps(loss)).parameters == loss.parameters


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_dice_of_images(reduction: str) -> None:
    """All that is not the first dimension is one row, whichever entry it came by."""
    x, y = torch.sigmoid(_random(2, 3, 4, 5)).requires_grad_(), _random(2, 3, 4, 5).gt(0).float()
    loss = F.dice_loss(x, y, reduction=reduction)
    loss.sum().backward()
    x, grad = x.detach(), x.grad
    out, added = torch.empty_like(x), torch.ones_like(x)
    for options in ({}, {"grad_out": out}, {"grad_out": added, "accumulate": True}):
        got, g = mbkern.loss_and_grad("dice_loss", x, y, reduction=reduction, **options)
        assert torch.equal(got, loss.detach())
        assert g.shape == x.shape
        assert options.get("grad_out", g) is g
        assert grad is not None
        assert torch.equal(g, grad + 1 if "accumulate" in options else grad)
    array, _ = mbkern.loss_and_grad("dice_loss", x.numpy(), y.numpy(), reduction=reduction)
    assert np.array_equal(array, loss.detach().numpy())
    strided = torch.empty(5, 4, 3, 2).permute(3, 2, 1, 0)
    with pytest.raises(ValueError, match=r"grad_out is \(2, 3, 4, 5\) .*strides"):
        mbkern.loss_and_grad("dice_loss", x, y, grad_out=strided)
    for wrong in ({"grad_out": torch.zeros(2, 60)}, {"grad_out": torch.zeros(2, 4, 3, 5)}):
        with pytest.raises(ValueError, match=r"grad_out must be \(2, 3, 4, 5\)"):
            mbkern.loss_and_grad("dice_loss", x, y, **wrong)
        assert not wrong["grad_out"].any()
    with pytest.raises(ValueError, match="of one shape"):
        mbkern.loss_and_grad("dice_loss", x, y.flatten(1))
    empty = x[:0].clone()
    _, g = mbkern.loss_and_grad("dice_loss", empty, y[:0], reduction="sum", grad_out=empty)
    assert g is empty
    over, g = mbkern.loss_and_grad("dice_loss", x, y, reduction=reduction, grad_out=x)
    assert torch.equal(over, loss.detach())
    assert g is x
    assert torch.equal(x, grad)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_weight_of_an_input_that_is_broadcast(name: str, reduction: str) -> None:
    """Torch's mean divides by the sum of the weights that it was given."""
    x, y, weight = _random(5).requires_grad_(), _random(4, 5), _random(5).abs()
    want = getattr(TF, name)(x, y, weight=weight, reduction=reduction)
    got = getattr(F, name)(x, y, weight=weight, reduction=reduction)
    torch.testing.assert_close(got, want)
    (g,), (h,) = (torch.autograd.grad(loss.sum(), x) for loss in (got, want))
    torch.testing.assert_close(g, h)


def test_deprecated_arguments_are_compiled() -> None:
    x, y = _random(4, 5), _random(4, 5)
    compiled = torch.compile(
        lambda a, b: F.mse_loss(a, b, size_average=False), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, y), F.mse_loss(x, y, reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_patched_losses_keep_torchs_dtype_under_autocast(dtype: torch.dtype) -> None:
    x, y = _random(4, 5).to(dtype), torch.rand(4, 5).to(dtype)
    for name in ("multilabel_soft_margin_loss", "gaussian_nll_loss"):
        more = (torch.rand(4, 5).to(dtype),) if name == "gaussian_nll_loss" else ()
        with torch.autocast("cpu", torch.bfloat16):
            want = getattr(TF, name)(x, y, *more)
            with mbkern.patched():
                got = getattr(TF, name)(x, y, *more)
        assert got.dtype is want.dtype


def test_a_key_that_is_none_is_an_error() -> None:
    """info_nce_loss ignores no row: it has no ``ignore_index``."""
    with pytest.raises(IndexError, match=r"-100 at flat index 1 .* is not in \[0, 4\)$"):
        F.info_nce_loss(_random(3, 4), torch.tensor([0, -100, 1]))


def test_distances_beyond_the_largest_number(isa: str) -> None:
    """That of positive and negative does not count without ``swap``, also where it overflows."""
    large = torch.finfo(torch.float32).max * 0.9
    tensors = [torch.tensor([[value, 0.0]], requires_grad=True) for value in (0.0, large, -large)]
    F.triplet_margin_loss(*tensors).backward()
    for tensor, want in zip(tensors, (-2.0, 1.0, 1.0), strict=True):
        torch.testing.assert_close(tensor.grad, torch.tensor([[want, 0.0]]))


@pytest.mark.parametrize(
    ("name", "option", "shape"),
    [
        ("mse_loss", "weight", (3, 4)),
        ("l1_loss", "weight", (3, 4)),
        ("huber_loss", "weight", (3, 4)),
        ("binary_cross_entropy", "weight", (3, 4)),
        ("binary_cross_entropy_with_logits", "weight", (3, 4)),
        ("binary_cross_entropy_with_logits", "pos_weight", (3, 4)),
        ("multilabel_soft_margin_loss", "weight", (4,)),
    ],
)
def test_the_dtype_of_a_weighted_loss_is_torchs(
    name: str, option: str, shape: tuple[int, ...]
) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for dtype, of_weight in itertools.product(dtypes, dtypes):
        x, y = (torch.full((3, 4), value, dtype=dtype) for value in (0.25, 0.75))
        options = {option: torch.full(shape, 0.5, dtype=of_weight)}
        for reduction in ("none", "sum", "mean"):
            want = getattr(TF, name)(x, y, reduction=reduction, **options)
            leaf = x.clone().requires_grad_()
            for value in (
                getattr(F, name)(x, y, reduction=reduction, **options),
                getattr(F, name)(leaf, y, reduction=reduction, **options),
                mbkern.loss_and_grad(name, x, y, reduction=reduction, **options)[0],
            ):
                assert value.dtype is want.dtype, (dtype, of_weight, reduction)
                torch.testing.assert_close(value, want, rtol=2e-2, atol=1e-3)


def test_gradient_of_class_probabilities_far_from_zero() -> None:
    """log S + (max - x) keeps the digits that (max + log S) - x would lose."""
    x = _random(5, 17).double() * 4 - 3141.0
    p = torch.softmax(_random(5, 17).double(), 1)
    shifted = x - x.amax(1, keepdim=True)
    want = torch.logsumexp(shifted, 1, keepdim=True) - shifted
    leaf = p.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(x, leaf, reduction="sum"), leaf)
    _, given = mbkern.loss_and_grad("cross_entropy", x, p, argnums=1, reduction="sum")
    for got in (grad, given):
        assert (got - want).abs().max() <= 2**-51 * want.abs().max()


def test_no_items_into_a_buffer_leave_what_was_saved() -> None:
    """Every tensor of no elements has the address 0, and is no output for that."""
    leaf = torch.zeros(0, 3, requires_grad=True)
    saved = leaf.exp()  # needs its result in backward
    mbkern.loss_and_grad(
        "mse_loss", saved.detach(), torch.zeros(0, 3), grad_out=torch.zeros(0, 3), accumulate=True
    )
    saved.sum().backward()
    out = torch.zeros(0, 3)
    version = out._version
    mbkern.loss_and_grad("mse_loss", torch.zeros(0, 3), torch.zeros(0, 3), grad_out=out)
    assert out._version > version


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss"])
def test_parts_of_a_tensor_with_a_graph_are_overwritten_under_no_grad(name: str) -> None:
    """As views of it, which torch refuses to give the history of; and what was saved is missed."""
    leaf = _random(6, 4).requires_grad_()
    body = leaf.exp()
    logits = body * 1
    target = torch.arange(6) % 4 if name == "cross_entropy" else torch.zeros(6, 4)
    want = mbkern.loss_and_grad(name, logits.detach().clone(), target, reduction="sum")[1]
    kept = (logits**2).sum()
    with torch.no_grad():
        for part, labels in zip(logits.split(2), target.split(2), strict=True):
            mbkern.loss_and_grad(name, part, labels, reduction="sum", grad_out=part)
        assert torch.equal(logits, want)
        mbkern.loss_and_grad(name, logits[:3], target[:3], reduction="sum", grad_out=logits[:3])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    logits.backward(want)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, want * body.detach())
