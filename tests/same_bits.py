"""Bits of tensors; the same ones from every instruction set and every number of threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mbkern import _C

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bits, NaN and the sign of 0 too."""
    assert a.dtype == b.dtype
    integer = INTEGER[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def check_same_bits(isa: str, digest: Callable[[], object]) -> None:
    """``digest`` must return with ``isa``, on 1 to 3 threads, what it does with "scalar" on one."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _C.set_isa("scalar")
        reference = digest()
        _C.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert digest() == reference, (isa, threads)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(before)
