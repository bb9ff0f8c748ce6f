"""Ways through autograd, and mixed precision."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from settings.setting import LossFunction, gradient, leaf, setting


@setting("Autograd", "backward", exact=True)
def backward(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    value = f(x, t)
    value.backward()
    return value, x.grad


@setting("Autograd", "`reduction='none'`, any incoming gradient")
def unreduced(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    results: list[Tensor | None] = []
    value = f(x, t, reduction="none")
    base = torch.linspace(-1, 2, 2 * value.numel(), dtype=value.dtype)
    strided = base[::2].reshape(value.shape)
    for incoming in (strided, torch.zeros(()).to(value).expand_as(value), strided * torch.nan):
        y = leaf(x)
        before = incoming.clone()
        f(y, t, reduction="none").backward(incoming)
        assert torch.equal(incoming.nan_to_num(), before.nan_to_num())
        results.append(y.grad)
    return results


@setting("Autograd", "`no_grad`, `inference_mode`", exact=True)
def without_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with torch.no_grad():
        first = f(leaf(x), t)
    with torch.inference_mode():
        second = f(x, t)
    return first, second.clone()


@setting("Autograd", "`retain_graph`, backward twice", exact=True)
def retain_graph(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    value = f(x, t)
    return gradient(value, x, retain_graph=True), gradient(value, x)


@setting("Autograd", "double backward (`create_graph`)", note="by formulas of torch operations")
def double_backward(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    first = gradient(f(x, t), x, create_graph=True)
    v = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x)
    return first, gradient((first * v).sum(), x)


@setting("Autograd", "forward mode (`forward_ad`)", note="by formulas of torch operations")
def dual(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with forward_ad.dual_level():
        value = f(forward_ad.make_dual(x, torch.ones_like(x)), t)
        return tuple(forward_ad.unpack_dual(value))


@setting("Autograd", "incoming gradient not finite, ignored items")
def not_finite(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    if not t.is_floating_point():
        t = t.clone()
        t[1] = -100
    results: list[Tensor | None] = []
    for factor in (torch.inf, -torch.inf, torch.nan):
        y = leaf(x)
        value = f(y, t)
        value.backward(torch.tensor(factor, dtype=value.dtype))
        assert y.grad is not None
        # Of an infinite factor torch's p - 1 makes NaN at the target, mbkern's -inf.
        results.append(y.grad[1] if factor == factor else y.grad)
    return results


@setting("Autograd", "`is_grads_batched`")
def batched_gradients(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    value = f(x, t)
    incoming = torch.arange(3).to(value)
    return torch.autograd.grad(value, x, incoming, is_grads_batched=True)


@setting("Autograd", "`checkpoint`, both kinds", exact=True)
def checkpointed(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    results = []
    for reentrant in (False, True):
        y = leaf(x)
        results.append(gradient_of(checkpoint(f, y, t, use_reentrant=reentrant), y))
    return results


def gradient_of(value: Tensor, x: Tensor) -> Tensor:
    value.backward()
    assert x.grad is not None
    return x.grad


@setting("Autograd", "`saved_tensors_hooks`", exact=True)
def hooks(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: s.clone(), lambda s: s):
        value = f(x, t)
    return value, gradient(value, x)


@setting("Autograd", "anomaly mode", exact=True)
def anomaly(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            return backward(f, x, t)


@setting("Mixed precision", "autocast")
def autocast(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = f(x, t)
    return value, gradient(value, x)


@setting("Mixed precision", "GradScaler")
def grad_scaler(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    x = leaf(x)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    value = f(x, t)
    scaler.scale(value).backward()
    return value, x.grad


@setting("Mixed precision", "deterministic, memory filled with NaN", exact=True)
def deterministic(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return backward(f, x, t)
    finally:
        torch.use_deterministic_algorithms(before)
