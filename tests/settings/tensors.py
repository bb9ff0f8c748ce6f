"""Tensors that are more or less than plain ones, and modes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from settings.autograd import backward
from settings.setting import LossFunction, gradient, leaf, setting


@setting("Tensors", "another default device", exact=True)
def default_device(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with torch.device("meta"):
        return backward(f, x, t)


class Subclass(torch.Tensor):
    pass


@setting("Tensors", "subclass through `__torch_function__`", exact=True)
def subclass(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(x)
    value = f(y.as_subclass(Subclass), t)
    assert type(value) is Subclass
    return value.as_subclass(Tensor), gradient(value.as_subclass(Tensor), y)


@setting("Tensors", "lazily negated view", exact=True)
def negated(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(-x)
    value = f(torch._neg_view(y), t)
    return value, -gradient(value, y)


@setting("Tensors", "FlopCounterMode and other dispatch modes", exact=True)
def dispatch_mode(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with FlopCounterMode(display=False):
        return backward(f, x, t)


@setting("Tensors", "DTensor", refusal="DTensor|sharding strategy|mixed torch.Tensor")
def dtensor(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        y, s = (DTensor.from_local(a, mesh, [Replicate()]) for a in (x, t))
        return (f(y, s),)
    finally:
        torch.distributed.destroy_process_group()


@setting("Tensors", "sparse", refusal="layout|[Ss]parse")
def sparse(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (f(x.to_sparse(), t),)


@setting("Tensors", "quantised", refusal="quint8|qint8|[Qq]uantized")
def quantised(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (f(torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), t),)


@setting("Tensors", "complex", refusal="complex")
def complex_numbers(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (f(torch.complex(x.float(), x.float()), t),)
