"""Memory between pages that cannot be touched, and calls in a child that may crash."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PROT_NONE, FAILED, MAP_NORESERVE = 0, ctypes.c_void_p(-1).value, 0x4000
#: A NaN that is not the canonical one in every floating type, and a class that does not exist.
POISON = 0xFF


def map_anonymous(size: int, flags: int = 0) -> int:
    """Address of fresh anonymous memory."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address: int = LIBC.mmap(None, size, protection, private | flags, -1, 0)
    if address == FAILED:
        raise MemoryError(os.strerror(ctypes.get_errno()))
    return address


def bytes_at(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=np.uint8)


class Block:
    """A few pages between two that cannot be touched. Holds one tensor at a time."""

    def __init__(self, size: int) -> None:
        self.size = (size + 64 + PAGE - 1) // PAGE * PAGE
        base = map_anonymous(self.size + 2 * PAGE)
        for guard in (base, base + PAGE + self.size):
            assert LIBC.mprotect(guard, PAGE, PROT_NONE) == 0
        self.bytes = bytes_at(base + PAGE, self.size)
        self.memory = torch.from_numpy(self.bytes)

    def place(
        self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, gap: int, back: bool
    ) -> Tensor:
        """A poisoned tensor, ``gap`` bytes from the guard at its end, or at its start."""
        self.bytes[:] = POISON
        elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        self.length = elements * dtype.itemsize
        self.start = self.size - self.length - gap if back else gap
        assert self.start % dtype.itemsize == 0
        flat = self.memory[self.start : self.start + self.length].view(dtype)
        self.tensor = flat.as_strided(shape, stride)
        return self.tensor

    def check(self, what: str) -> None:
        """Nothing was written beside the tensor."""
        outside = (self.bytes[: self.start], self.bytes[self.start + self.length :])
        assert all((part == POISON).all() for part in outside), f"{what}: written out of bounds"


class Arena:
    """Blocks for the tensors of one call, each at its own distance from a guard."""

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks = [Block(size) for _ in range(blocks)]

    def start(self, slack: int, back: bool) -> None:
        """Place what follows 0-63 bytes from the guards behind (or before) the tensors."""
        self.slack, self.back, self.used = slack, back, 0
        self.outputs: list[Block] = []

    def _next(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        gap = self.slack * (2 * self.used + 1) % 64 // dtype.itemsize * dtype.itemsize
        block = self.blocks[self.used]
        self.used += 1
        return block.place(shape, stride, dtype, gap, self.back)

    def copy(self, like: Tensor) -> Tensor:
        """The same values in the same layout, guarded."""
        return self._next(like.shape, like.stride(), like.dtype).copy_(like)

    def output(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Poison in the same layout, guarded, all of which must be overwritten."""
        tensor = self._next(like.shape, like.stride(), dtype or like.dtype)
        self.outputs.append(self.blocks[self.used - 1])
        return tensor

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """What mbkern allocates is guarded and poisoned, too."""
        empty = torch.empty
        meta = {"device": "meta"}
        with (
            mock.patch("torch.empty", lambda *a, **k: self.output(empty(*a, **(k | meta)))),
            mock.patch("torch.empty_like", lambda like, dtype=None: self.output(like, dtype)),
        ):
            yield

    def check(self, what: str) -> None:
        """Nothing beside the tensors was written, and every element of the outputs was."""
        for block in self.blocks[: self.used]:
            block.check(what)
        for block in self.outputs:
            if block.length:
                tensor = block.tensor
                integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
                assert not (tensor.view(integer) == -1).any(), f"{what}: an element was not written"


def fork(function: Callable[[], object]) -> tuple[int, int]:
    """Process and pipe of a child that runs ``function``, and writes the traceback if it fails."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads exist
        pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    faulthandler.disable()  # the parent reports the signal
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        os.write(write, traceback.format_exc()[-60000:].encode())
    finally:
        os._exit(status)


def wait(child: tuple[int, int], timeout: float = 60.0) -> None:
    """Fail with the child's traceback, its signal, or because it hangs."""
    pid, read = child
    text, deadline = b"", time.monotonic() + timeout
    while select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(read, 65536)
        if not part:
            break
        text += part
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pytest.fail(f"the child hangs: no end after {timeout} s")
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        pytest.fail(f"the child was killed by {signal.Signals(os.WTERMSIG(status)).name}")
    if status:
        pytest.fail(text.decode())


def in_child(function: Callable[[], object], timeout: float = 60.0) -> None:
    """Run a function that may crash or hang."""
    wait(fork(function), timeout)
