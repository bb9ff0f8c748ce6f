"""One way's peak memory above its inputs: ``memory_worker.py REQUEST``, started by memory.py."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mbkern

_PROCESS = Path("/proc/self")


def _status(name: str) -> int:
    """A size in bytes from the kernel's account of this process."""
    match = re.search(rf"^{name}:\s*(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    if not match:
        raise RuntimeError(f"no {name} in /proc/self/status")
    return int(match[1]) * 1024


def _way(name: str, x: Tensor, t: Tensor) -> Callable[[], Any]:
    if name == "mbkern in place":
        plain = x.detach()
        return lambda: mbkern.loss_and_grad("cross_entropy", plain, t, grad_out=plain)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch": F.cross_entropy,
        "torch.compile": torch.compile(lambda x, t: F.cross_entropy(x, t), dynamic=False),
        "mbkern autograd": mbkern.functional.cross_entropy,
    }
    function = functions[name]

    def run() -> Tensor:
        loss = function(x, t)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return run


def main(request: str) -> None:
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    rows, columns = asked["shape"]
    x = torch.empty(rows, columns, dtype=getattr(torch, asked["dtype"])).normal_().requires_grad_()
    t = torch.empty(rows, dtype=torch.int64).random_(columns)
    run = _way(asked["way"], x, t)
    mark = _PROCESS / "clear_refs"
    try:
        mark.write_text("5")
        resettable = True
    except OSError:
        resettable = False
    if resettable:
        run()
        x.grad = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        mark.write_text("5")
    before = _status("VmRSS" if resettable else "VmHWM")
    run()
    method = "VmHWM after - VmRSS before" if resettable else "VmHWM after - before, first run"
    print(json.dumps({"bytes": _status("VmHWM") - before, "method": method}))


if __name__ == "__main__":
    main(sys.argv[1])
