"""The kernels' own elementary functions, for arrays: the same bits on every processor."""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern import _C, _cuda
from mbkern._tensors import CUDA_BUILT, on_cuda


def elementary(name: str, x: Tensor, isa: str | None = None) -> Tensor:
    """A function by its name, of a float32 or float64 tensor; see docs/numerics-elementary.md.

    Args:
        name: one of ``_C.elementary_functions()``.
        x: of any shape and layout.
        isa: the instruction set; None: the one in use.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    if CUDA_BUILT and on_cuda(x):
        done = _cuda.on_device_of(x, _C.cuda_elementary)(name, (x, y, _cuda.current_stream(x)))
        if not done:
            raise ValueError(f"mbkern: no elementary function {name!r} on CUDA")
        return y
    double = x.dtype is torch.float64
    _C.elementary(isa or _C.isa(), name, double, x.data_ptr(), y.data_ptr(), x.numel())
    return y
