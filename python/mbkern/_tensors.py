"""What a pointer may be taken of, and which memory a tensor's elements lie in."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from mbkern import _C

#: Storage types in the order of ``mbk::DType``.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
#: Types of class indices in the order of ``mbk::IndexType``.
INDEX_TYPES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.int8: 3, torch.uint8: 4}

_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_jit_tracing = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


#: Asked before ``on_cuda`` where a small call would feel a function's time.
CUDA_BUILT = _C.cuda_built()

if _C.cuda_is_shim():

    def on_cuda(tensor: Tensor) -> bool:
        """Whether CUDA's kernels take a tensor; in this build, for tests, those of the CPU."""
        return tensor.is_cpu and _C.cuda_shim_is_on()

elif _C.cuda_built():

    def on_cuda(tensor: Tensor) -> bool:
        """Whether CUDA's kernels take a tensor."""
        return tensor.is_cuda

else:

    def on_cuda(tensor: Tensor) -> bool:
        """Whether CUDA's kernels take a tensor; this build has none."""
        return False


def has_kernels(tensor: Tensor) -> bool:
    """Whether a tensor lies on a device that this build has kernels for."""
    return tensor.is_cpu or on_cuda(tensor)


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor for an error message."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def require_plain(tensor: Tensor, name: str) -> Tensor:
    """Return ``tensor`` if its memory may be read by address, or raise.

    ``data_ptr()`` of a fake, meta or functorch tensor is 0 and raises nothing, so this is the guard
    against a crash. A lazily negated view is materialised.
    """
    if (
        type(tensor) in _PLAIN
        and (tensor.is_cpu or on_cuda(tensor))
        and tensor.layout is _STRIDED
        and not tensor.is_neg()
        and not _functorch_active()
        and (tensor.data_ptr() or not tensor.numel())
    ):
        return tensor
    return _explain(tensor, name)


def _explain(tensor: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"mbkern: {name} must be a tensor, not {type(tensor).__name__}")
    if type(tensor) not in _PLAIN:
        raise TypeError(
            f"mbkern: {name} is a {type(tensor).__name__}; tensor subclasses (fake, distributed, "
            "user-defined) are not supported here: pass a plain torch.Tensor"
        )
    if _functorch_active() and _is_wrapped(tensor):
        raise NotImplementedError(
            f"mbkern: {name} is inside a torch.func transform (vmap, grad, ...); mbkern.functional "
            "and mbkern.nn support those, mbkern.loss_and_grad and LossSum do not"
        )
    if not has_kernels(tensor):
        cure = "; install with MBKERN_CUDA=ON" if tensor.is_cuda else ""
        built = "CPU and CUDA tensors" if _C.cuda_built() else "CPU tensors"
        raise NotImplementedError(
            f"mbkern: {name} is on {tensor.device}; this build has kernels for {built} only{cure}"
        )
    if tensor.layout is not _STRIDED:
        raise TypeError(
            f"mbkern: {name} has layout {tensor.layout}; only strided tensors are supported"
        )
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(
            f"mbkern: {name} has no memory: {describe(tensor)}; its storage was freed, or never was"
        )
    return tensor.resolve_neg()


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a tensor requires grad; inside vmap it does not say so, what it wraps does."""
    wrapped = tensor
    while not wrapped.requires_grad:
        if _is_compiling() or not _is_wrapped(wrapped):
            return False
        wrapped = torch._C._functorch.get_unwrapped(wrapped)
    return True


def calls_are_watched() -> bool:
    """Whether a mode sees torch's calls, and would not see a kernel. A default device
    (``torch.set_default_device``, ``with torch.device(...)``) is a mode that need not.
    """
    if _dispatch_modes() > 0:
        return True
    function_mode = torch._C._get_function_stack_at
    return any(type(function_mode(k)) is not DeviceContext for k in range(_function_modes()))


def refuse_tracing(name: str) -> None:
    """Refuse to be traced: a tracer would record the allocation of results, and not the kernel."""
    if _jit_tracing() is None and not _dispatch_modes() and not _function_modes():
        return
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if detect_fake_mode() is not None:
        raise NotImplementedError(
            f"mbkern: {name} computes nothing under FakeTensorMode; mbkern.functional and "
            "mbkern.nn do"
        )
    if _jit_tracing() is not None or get_proxy_mode() is not None:
        raise NotImplementedError(
            f"mbkern: {name} cannot be traced (make_fx, torch.jit.trace, torch.export); "
            "mbkern.functional and mbkern.nn can"
        )


def require_one_device(
    first: Tensor, scalars: dict[str, object], tensors: dict[str, Tensor | None]
) -> None:
    """Raise if a tensor of a call lies on another device than the first one.

    Scalars that are tensors may lie on the CPU: their value is then read at once.
    """
    for name, value in (*scalars.items(), *tensors.items()):
        if not isinstance(value, Tensor) or value.device == first.device:
            continue
        if name not in scalars or not value.is_cpu:
            raise ValueError(
                f"mbkern: all tensors of a call must lie on one device: {name} is on "
                f"{value.device}, the first of them on {first.device}"
            )


def require_dtype(tensor: Tensor, name: str) -> int:
    """Return the number of a floating storage type, or raise."""
    number = DTYPES.get(tensor.dtype)
    if number is None:
        raise TypeError(
            f"mbkern: {name} is {tensor.dtype}; supported are float32, bfloat16, float16 and "
            "float64"
        )
    return number


def has_internal_overlap(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may share memory (expanded, or strided over itself)."""
    if tensor.is_contiguous():
        return False
    needed = 0
    pairs = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in pairs:
        if size <= 1:
            continue
        if stride <= needed:
            return True
        needed += stride * (size - 1)
    return False


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """First and past-the-last address that the elements of a tensor lie in."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if tensor.numel() == 0:
        return start, start
    span = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (span + 1) * tensor.element_size()


def meets(tensor: Tensor, start: int, end: int) -> bool:
    """Whether the byte range of a tensor meets that of others."""
    first, last = byte_range(tensor)
    return first < end and start < last


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the byte ranges of two tensors meet."""
    return meets(a, *byte_range(b))


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor, without an import that takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in the same places."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and all(n == 1 or i == j for n, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))
    )
