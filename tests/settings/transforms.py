"""Transforms of torch.func."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from settings.setting import LossFunction, gradient, leaf, setting


@setting("torch.func", "`grad`", exact=True)
def func_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    grad, value = torch.func.grad_and_value(f)(x, t)
    return value, grad


def batches(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack((x, x.flip(0), x / 2)), torch.stack((t, t.flip(0), t))


@setting("torch.func", "`vmap`")
def vmap(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    many, targets = batches(x, t)
    return (
        torch.vmap(f)(many, targets),
        torch.vmap(f, (0, None))(many, t),
        torch.vmap(f, (None, 1))(x, targets.movedim(0, 1)),
    )


@setting("torch.func", "`grad(vmap)`, backward through `vmap`")
def grad_vmap(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    many, targets = batches(x, t)

    def total(x: Tensor) -> Tensor:
        return torch.vmap(f)(x, targets).sum()

    y, z = leaf(many), leaf(x)
    beside = torch.vmap(lambda t: f(z, t))(targets)  # the input is not what is mapped over
    return torch.func.grad(total)(many), gradient(total(y), y), gradient(beside, z)


@setting("torch.func", "`vmap(grad)`")
def vmap_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (torch.vmap(torch.func.grad(f))(*batches(x, t)),)


@setting(
    "torch.func", "`torch.compile` of `grad`, `vmap(grad)`", note="by formulas of torch operations"
)
def compiled_grad(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    def single(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.grad(f)(x, t)

    def many(x: Tensor, t: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(f))(x, t)

    torch._dynamo.reset()
    one, each = (
        torch.compile(call, fullgraph=True, backend="aot_eager") for call in (single, many)
    )
    return one(x, t), each(*batches(x, t))


@setting("torch.func", "`jacrev`")
def jacrev(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (torch.func.jacrev(lambda x: f(x, t, reduction="none"))(x),)


@setting("torch.func", "`jvp`, `jacfwd`", note="by formulas of torch operations")
def jacfwd(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (
        *torch.func.jvp(lambda x: f(x, t), (x,), (torch.ones_like(x),)),
        torch.func.jacfwd(lambda x: f(x, t))(x),
    )


@setting("torch.func", "`hessian`, `jacrev(jacrev)`", note="by formulas of torch operations")
def hessian(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    def value(x: Tensor) -> Tensor:
        return f(x, t)

    return torch.func.hessian(value)(x), torch.func.jacrev(torch.func.jacrev(value))(x)


@setting("torch.func", "`vmap(jacrev(jacrev))`", note="by formulas of torch operations")
def vmap_hessian(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    many, targets = batches(x, t)
    nested = torch.func.jacrev(torch.func.jacrev(f))
    return torch.vmap(nested)(many, targets), torch.vmap(torch.func.hessian(f))(many, targets)


@setting("torch.func", "`functionalize`, `linearize`", note="by formulas of torch operations")
def functionalize(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    value, pushed = torch.func.linearize(lambda x: f(x, t), x)
    return (
        torch.func.functionalize(f)(x, t),
        torch.func.grad(torch.func.functionalize(f))(x, t),
        torch.func.functionalize(torch.func.grad(f))(x, t),
        value,
        pushed(torch.ones_like(x)),
    )
