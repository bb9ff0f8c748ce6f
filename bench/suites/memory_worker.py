"""One way's peak memory above its inputs: ``memory_worker.py REQUEST``, started by memory.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mbkern
from mbkern.bench import memory


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


def _head(asked: dict[str, Any]) -> tuple[Callable[[], Any], Tensor]:
    """A way through a head; the buffer of the imperative one is an input."""
    rows, features, classes = asked["head"]
    x = torch.empty(rows, features).normal_().requires_grad_()
    w = torch.empty(classes, features).normal_(std=0.05).requires_grad_()
    t = torch.empty(rows, dtype=torch.int64).random_(classes)
    buffer = torch.ones(classes, features)

    def imperative() -> Any:
        return mbkern.loss_and_grad(
            "linear_cross_entropy", x.detach(), w.detach(), t, argnums=(0, 1),
            grad_out=(None, buffer), accumulate=True,
        )  # fmt: skip

    def autograd() -> Any:
        w.grad = None
        if asked["way"] == "torch":
            loss = F.cross_entropy(F.linear(x, w), t)
        else:
            loss = mbkern.functional.linear_cross_entropy(x, w, t)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return imperative if asked["way"] == "imperative" else autograd, x


def main(request: str) -> None:
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    if "head" in asked:
        run, x = _head(asked)
    else:
        rows, columns = asked["shape"]
        dtype = getattr(torch, asked["dtype"])
        x = torch.empty(rows, columns, dtype=dtype).normal_().requires_grad_()
        t = torch.empty(rows, dtype=torch.int64).random_(columns)
        run = _way(asked["way"], x, t)
    resettable = memory.reset_mark()
    if resettable:
        run()
        x.grad = None
        memory.give_back()
        memory.reset_mark()
    before = memory.status("VmRSS" if resettable else "VmHWM")
    run()
    method = "VmHWM after - VmRSS before" if resettable else "VmHWM after - before, first run"
    print(json.dumps({"bytes": memory.status("VmHWM") - before, "method": method}))


if __name__ == "__main__":
    main(sys.argv[1])
