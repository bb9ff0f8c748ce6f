"""Products whose sums are taken in a fixed order: ``c += a^T b`` into a buffer of full precision.

The one product that torch does not have on the CPU (16-bit operands added in place to float32), and
the one whose result does not depend on how the sum is cut: each element is a chain of fused
multiply-adds that starts from the buffer. See csrc/cpu/product.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbkern import _C, _cuda
from mbkern._tensors import CUDA_BUILT, describe, on_cuda

CHAIN, BLOCKS, PAIRS = 0, 1, 2
BLOCK = _C.PRODUCT_BLOCK
has_pairs = _C.has_bf16_pairs


def beat_torch(dtype: torch.dtype) -> bool:
    """Whether products of float32, or that with a gradient of logits in bfloat16, take less time
    than torch's on this processor.

    MKL takes AVX2's instructions on AMD's processors: where the units have 512 bits, twice our
    time. bfloat16 is multiplied by oneDNN, in 1.05 to 1.15 times ours; so is float32 for those who
    allow that (``torch.set_float32_matmul_precision("medium")``), which is faster, and stays.
    """
    if not _C.is_amd() or _C.isa() != "avx512":
        return False
    if dtype is torch.bfloat16:
        return has_pairs()
    if dtype is not torch.float32 or _may_round_to_bfloat16():
        return False
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def _may_round_to_bfloat16() -> bool:
    # The older getter raises where the newer settings say what it has no word for.
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(settings, "fp32_precision", None)
    if precision is not None:
        return bool(precision == "bf16")
    return torch.get_float32_matmul_precision() == "medium"


def product(
    c: Tensor, a: Tensor, b: Tensor, order: int = CHAIN, *, fresh: bool = False,
    skip_below: float = 0.0,
) -> Tensor:  # fmt: skip
    """``c += a^T b``, or with ``fresh`` ``c = a^T b``; returns c.

    Args:
        c: (rows, columns), columns contiguous; float32, or float64 for float64 operands.
        a, b: (depth, rows) and (depth, columns), of any strides.
        order: CHAIN: ``c = fma(a_k, b_k, c)`` with k ascending, so that the depth may be cut
            anywhere; BLOCKS: chains from 0 over blocks of 256, added to c in order; PAIRS: of
            bfloat16, two terms at a time, fast, on the CPU where ``has_pairs()``.
        skip_below: leave out runs of the depth of a few rows of c where all of ``a`` is smaller;
            on the CPU.
    """
    kernel, threads, scratch, stream = _C.product, torch.get_num_threads(), None, 0
    if CUDA_BUILT and on_cuda(c):
        kernel, stream = _cuda.on_device_of(c, kernel), _cuda.current_stream(c)
    else:
        scratch = torch.empty(threads * _C.PRODUCT_SCRATCH, dtype=torch.uint8, device="cpu")
    if kernel((a, b, c, fresh, order, skip_below, threads, scratch, stream)) is None:
        raise NotImplementedError(
            f"mbkern: no product of {describe(a)} and {describe(b)} into {describe(c)}"
        )
    return c
