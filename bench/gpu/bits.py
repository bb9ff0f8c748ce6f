"""Elementary functions over all 2^32 inputs: the digest of the CPU's tiers must come out.

That digest is in docs/numerics-elementary.md, made by tests/native/exhaustive.cpp: FNV-1a over the
words of each chunk of 2^15 results, and over the digests of the chunks. Here as many chunks as fit
are hashed side by side: result k of every chunk is row k of a matrix, and a step of the hash takes
a row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gpu.stage import FAILED, PASSED, ROOT, Clock, Report
from mbkern import _C

CHUNK = 1 << 15
BASIS, PRIME, WORD = 0xCBF29CE484222325, 0x100000001B3, 2**64
Function = Callable[[str, Tensor, Tensor], None]  # name, from, to


def on_gpu(name: str, x: Tensor, y: Tensor) -> None:
    """Compute by the CUDA kernel."""
    stream = torch.cuda.current_stream().cuda_stream
    if not _C.cuda_elementary(name, (x, y, stream)):
        raise ValueError(f"no CUDA kernel of {name}")


def on_cpu(name: str, x: Tensor, y: Tensor) -> None:
    """Compute by the best instruction set of this machine."""
    _C.elementary(_C.isas()[0], name, False, x.data_ptr(), y.data_ptr(), x.numel())


def fnv(digest: int, word: int) -> int:
    """A step of FNV-1a over words."""
    return (digest ^ word) * PRIME % WORD


def hash_columns(words: Tensor) -> Tensor:
    """FNV-1a down every column of a matrix of 32-bit words; the digests' bits as int64."""
    unsigned = words.to(torch.int64).bitwise_and_(0xFFFFFFFF)
    digest = torch.full_like(unsigned[0], BASIS - WORD)
    for row in unsigned:
        digest.bitwise_xor_(row).mul_(PRIME)
    return digest


def inputs(first: int, steps: int, chunks: int, device: str) -> Tensor:
    """The numbers with the bits first + CHUNK * column + row, modulo 2^32."""
    row = torch.arange(steps, device=device)[:, None]
    bits = (row + torch.arange(first, first + CHUNK * chunks, CHUNK, device=device)) & 0xFFFFFFFF
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


def span(name: str) -> tuple[int, int]:
    """The first bit pattern of a function, and how many there are: as in exhaustive.cpp."""
    return (1 << 31, (1 << 31) + 1) if name == "exp_nonpositive" else (0, 1 << 32)


def pieces(first: int, count: int, chunks: int) -> Iterator[tuple[int, int, int]]:
    """(first, steps, chunks) of matrices that cover count numbers from first on, in order."""
    whole, rest = divmod(count, CHUNK)
    for start in range(0, whole, chunks):
        yield first + start * CHUNK, CHUNK, min(chunks, whole - start)
    if rest:
        yield first + whole * CHUNK, rest, 1


def digest(name: str, compute: Function, device: str, count: int | None = None,
           chunks: int = 1 << 13) -> int:  # fmt: skip
    """The digest of a function over its first ``count`` inputs, or all."""
    first, total = span(name)
    result = BASIS
    for piece in pieces(first, total if count is None else count, chunks):
        x = inputs(*piece, device)
        y = torch.full_like(x, 7.0)
        compute(name, x, y)
        for word in hash_columns(y.view(torch.int32)).tolist():
            result = fnv(result, word % WORD)
    return result


def first_difference(name: str, compute: Function, device: str) -> str:
    """Where a device and the CPU part, in words."""
    first, total = span(name)
    for piece in pieces(first, total, 1 << 11):
        x = inputs(*piece, device)
        y, there = torch.empty_like(x), x.cpu()
        expected = torch.empty_like(there)
        compute(name, x, y)
        on_cpu(name, there, expected)
        a, b = y.cpu().view(torch.int32), expected.view(torch.int32)
        if not torch.equal(a, b):
            at = (a != b).nonzero()[0].tolist()
            bits = [t.view(torch.int32)[tuple(at)].item() & 0xFFFFFFFF for t in (there, a, b)]
            return "{:#x} gives {:#x}, not {:#x}".format(*bits)
    return "all results are those of the CPU here: the documented digest is wrong"


def documented() -> dict[str, int]:
    """The digests of docs/numerics-elementary.md, by function."""
    text = (ROOT / "docs/numerics-elementary.md").read_text()
    rows = re.findall(r"^\| (\w+) \| fp32 \|.*\| ([0-9a-f]{16}) \| ok \|$", text, re.MULTILINE)
    return {name: int(value, 16) for name, value in rows}


def check(device: str, clock: Clock) -> Report:
    """All functions over all inputs; "cpu" takes half an hour on two cores."""
    compute = on_cpu if device == "cpu" else on_gpu
    expected = documented()
    wrong = [
        f"{name}: documented nowhere" for name in _C.elementary_functions() if name not in expected
    ]
    details: dict[str, Any] = {"functions": {}}
    for name, right in expected.items():
        if not clock.left():
            wrong.append(f"{name}: out of time")
            continue
        start = time.perf_counter()
        found = digest(name, compute, device)
        seconds = time.perf_counter() - start
        details["functions"][name] = {"digest": f"{found:016x}", "seconds": round(seconds, 1)}
        verdict = "ok" if found == right else "DIFFERS"
        print(f"{name:<16} {found:016x} {verdict}  {seconds:.1f} s", flush=True)
        if found != right:
            wrong.append(f"{name}: {first_difference(name, compute, device)}")
    return Report(FAILED if wrong else PASSED, "; ".join(wrong), details)


def rehearse(clock: Clock) -> Report:
    """The first inputs on the CPU, hashed side by side and one after the other."""
    count = CHUNK + 5
    wrong = []
    for name in documented():
        found = digest(name, on_cpu, "cpu", count)
        x = torch.cat(
            [inputs(*piece, "cpu").T.flatten() for piece in pieces(span(name)[0], count, 1)]
        )
        y = torch.empty_like(x)
        on_cpu(name, x, y)
        expected = BASIS
        for chunk in y.view(torch.int32).split(CHUNK):
            inner = BASIS
            for word in chunk.tolist():
                inner = fnv(inner, word & 0xFFFFFFFF)
            expected = fnv(expected, inner)
        print(f"{name:<16} {found:016x} {'ok' if found == expected else 'DIFFERS'}")
        if found != expected or not clock.left():
            wrong.append(name)
    return Report(FAILED if wrong else PASSED, ", ".join(wrong))
