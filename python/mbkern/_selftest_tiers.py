"""What a case of the self-test runs on: each instruction set with some thread counts, and CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbkern import _C
from mbkern._elementary import elementary


@dataclass(frozen=True)
class Tier:
    """One of the ways to the same bits.

    Attributes:
        name: in messages: an instruction set and its threads, "cuda", or "shim".
        on_cuda: whether CUDA's kernels run; there, a bad class index does not raise.
        isa: the instruction set, where the CPU's kernels run.
        threads: how many, where the CPU's kernels run.
    """

    name: str
    on_cuda: bool = False
    isa: str = ""
    threads: int = 1

    def enter(self) -> None:
        """Let the calls that follow run here."""
        torch.set_num_threads(self.threads)
        _C.cuda_switch_shim(self.name == "shim")
        if self.isa:
            _C.set_isa(self.isa)

    def move(self, tensor: Tensor) -> Tensor:
        """The same tensor, strides and all, in the memory of this tier."""
        if self.name != "cuda":
            return tensor
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        return copy.copy_(tensor)

    def elementary(self, name: str, x: np.ndarray[Any, Any]) -> Tensor:
        """An elementary function of an array of float32 or float64."""
        return elementary(name, self.move(torch.from_numpy(x)), self.isa or None).cpu()


def find_tiers(device: str | None, thread_counts: Callable[[], list[int]]) -> list[Tier]:
    """What there is to run on: of a device ("cpu" or "cuda"), or everything."""
    found = []
    if device != "cuda":
        found += [
            Tier(f"{isa}, {threads} threads", isa=isa, threads=threads)
            for isa in _C.isas()
            for threads in thread_counts()
        ]
    if device != "cpu" and _C.cuda_is_shim():  # a build for tests: CUDA's kernels, on the CPU
        found.append(Tier("shim", on_cuda=True))
    elif device != "cpu" and _C.cuda_built() and torch.cuda.is_available():
        found.append(Tier("cuda", on_cuda=True))
    return found
