"""What a call on CUDA needs besides its tensors: the current stream, a workspace, its device.

Nothing here waits for the device, but :func:`take_target_errors`. Memory is torch's: a workspace
comes from its caching allocator, so a graph capture owns it, and freeing it follows the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mbkern import _C

Result = TypeVar("Result")

_IS_SHIM = _C.cuda_is_shim()
# Plain functions of C; their public names go through three of Python, and only a CUDA torch has
# them.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)
_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)


def current_stream(tensor: Tensor) -> int:
    """The address of the stream that torch would now use for ``tensor``."""
    return 0 if _IS_SHIM else _stream(tensor.get_device())


def new_workspace(like: Tensor, items: int, in_double: bool = False) -> Tensor:
    """Memory for what a call keeps between its kernels; its first number ends as the divisor."""
    size = (_C.cuda_workspace_bytes(items, in_double) + 7) // 8
    return torch.empty(size, dtype=torch.float64, device=like.device)


def on_device_of(tensor: Tensor, kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel, to be called with the device of ``tensor`` as the current one."""
    if _IS_SHIM:
        return kernel
    index = tensor.get_device()
    if index != _current_device():
        return partial(_switch, index, kernel)
    # Torch only notes the device that it will choose at its own next launch.
    _C.cuda_use_device(index)
    return kernel


def _switch(index: int, kernel: Callable[..., Result], *args: Any) -> Result:
    with torch.cuda.device(index):
        _C.cuda_use_device(index)
        return kernel(*args)


@dataclass(frozen=True)
class TargetErrors:
    """Class indices out of range that were met on a device.

    Attributes:
        count: how many.
        item: the flat index of one of them in its call's target; -1 if there was none. Of the fused
            head's: in the chunk of rows, or among those left by ``num_valid``, that it was met in.
        value: that class index.
        columns: the number of classes of that call.
    """

    count: int
    item: int
    value: int
    columns: int


def take_target_errors(device: torch.device | str | int | None = None) -> TargetErrors:
    """Return what bad class indices a CUDA device has met since the last time, and forget them.

    On the CPU a class index that is neither in range nor ``ignore_index`` raises IndexError. On
    CUDA nobody waits for the device, so the loss and the gradient of such an item become NaN (and
    with them a reduced loss), and the device takes a note, which is read here. Waits for the
    device: call it where the loss is looked at anyway. A head whose vocabulary is cut over
    processes takes no note: no kernel of it sees the targets.

    Args:
        device: a CUDA device; None is the current one.
    """
    if not _C.cuda_built():
        raise NotImplementedError(
            "mbkern: there are no class indices on CUDA: this build has kernels for CPU tensors "
            "only; install with MBKERN_CUDA=ON"
        )
    if _IS_SHIM:
        return TargetErrors(*_C.cuda_take_target_errors())
    if device is not None and torch.device(device).type != "cuda":
        raise ValueError(f"mbkern: device must be a CUDA device, not {device}; the CPU raises")
    if not torch.cuda.is_available():
        raise NotImplementedError(
            "mbkern: there are no class indices on CUDA: this torch sees no GPU"
        )
    with torch.cuda.device(device):  # None: the current one
        _C.cuda_use_device(_current_device())
        return TargetErrors(*_C.cuda_take_target_errors())
