"""The same bits from every instruction set and every number of threads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mbkern import _C


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
