"""Threads, forks, copies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from guarded import in_child
from torch import Tensor

from settings.autograd import backward
from settings.compilers import Module
from settings.setting import LossFunction, leaf, setting


@setting("Processes", "several Python threads at once", exact=True)
def threads(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: backward(f, x, t), range(16)))
    return [tensor for result in results for tensor in result]


@setting("Processes", "forked child", exact=True)
def forked(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    y = leaf(x)
    value = f(y, t)
    shared = [torch.zeros_like(a).share_memory_() for a in (value.detach(), x)]

    def call() -> None:
        torch.set_num_threads(1)
        for to, result in zip(shared, backward(f, x, t), strict=True):
            assert result is not None
            to.copy_(result.detach())

    in_child(call)
    return shared


@setting("Processes", "copied and pickled modules", exact=True)
def modules(f: LossFunction, x: Tensor, t: Tensor) -> Sequence[Tensor | None]:
    return (copy.deepcopy(Module(f))(x, t),)
