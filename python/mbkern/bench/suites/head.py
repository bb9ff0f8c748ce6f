"""The head of a language model, forward and backward, against the products that it consists of.

The limits are the bare products of the same chunks by torch: logits, ``G W`` and ``G^T X``, three;
four where backward computes the logits again. Everything else (the loss, sums in float32, packing)
has to fit between. Gradients that are returned are fresh each time, and dropped outside the time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mbkern
import mbkern.functional as M
from mbkern import _C
from mbkern.bench import peers
from mbkern.bench.models import GPT2, LLAMA, LLAMA_8B, QWEN, Model
from mbkern.bench.problem import TOLERANCE, Case, Plan, Problem, dtype_of
from mbkern.bench.timing import Way

SUITE = "linear_cross_entropy"
CHUNK = 64 << 20  # bytes of logits, as of mbkern's head
SAMPLE = 16  # rows that are held to fp64


class Head:
    """One head's tensors, and the ways to its gradients."""

    def __init__(self, rows: int, model: Model, dtype: torch.dtype, plan: Plan) -> None:
        g = torch.Generator().manual_seed(6)
        x = torch.randn(rows, model.features, generator=g)
        w = torch.randn(model.classes, model.features, generator=g) * 0.05
        self.rows, self.device = rows, plan.device
        self.x = x.to(plan.device, dtype).requires_grad_()
        self.w = w.to(plan.device, dtype).requires_grad_()
        self.target = torch.randint(model.classes, (rows,), generator=g).to(plan.device)
        self.buffer = torch.zeros(model.classes, model.features, device=plan.device)
        self.products_flops = 2 * rows * model.features * model.classes
        few = slice(0, SAMPLE)
        wide = self.x.detach()[few].double().requires_grad_()
        logits = F.linear(wide, self.w.detach().double())
        loss = F.cross_entropy(logits, self.target[few], reduction="sum") / rows
        (self.exact,) = torch.autograd.grad(loss, wide)

    def error(self, grad: Tensor) -> float:
        """Largest error of the gradient of the first rows over the largest gradient there."""
        off = (grad[:SAMPLE].double() - self.exact).abs().max()
        return float(off / self.exact.abs().max())

    def drop(self) -> None:
        """Forget the gradients."""
        self.x.grad = self.w.grad = None

    def through(self, head: Callable[..., Tensor], **options: Any) -> Tensor:
        """Loss and gradients by autograd; the input's gradient."""
        head(self.x, self.w, self.target, **options).backward()  # type: ignore[no-untyped-call]
        assert self.x.grad is not None
        return self.x.grad

    def imperative(self, **options: Any) -> Tensor:
        """The weight's gradient added in place; the input's gradient."""
        _, (grad, _) = mbkern.loss_and_grad(
            "linear_cross_entropy", self.x.detach(), self.w.detach(), self.target,
            argnums=(0, 1), grad_out=(None, self.buffer), accumulate=True, **options,
        )  # fmt: skip
        assert isinstance(grad, Tensor)
        return grad

    def products(self) -> Callable[[int], Tensor]:
        """The bare products, into memory that is there."""
        chunks = -(-self.rows * len(self.w) * self.w.element_size() // CHUNK)
        step = -(-self.rows // chunks)
        logits = torch.empty(step, len(self.w), dtype=self.w.dtype, device=self.device)
        sums, dx = torch.zeros_like(self.w), torch.empty_like(self.x)
        x, w, dx = self.x.detach(), self.w.detach(), dx.detach()

        def run(times: int) -> Tensor:
            for first in range(0, len(x), step):
                part = x[first : first + step]
                z = logits[: len(part)]
                for _ in range(times):
                    torch.mm(part, w.t(), out=z)
                torch.mm(z, w, out=dx[first : first + step])
                torch.addmm(sums, z.t(), part, out=sums)
            return dx

        return run


def _unfused(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target)


def _chunked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(x, w, target, options=options)
    return loss


def _split_on(isa: str, h: Head) -> Tensor:
    before = _C.isa()
    _C.set_isa(isa)
    try:
        return h.imperative(split_invariant=True)
    finally:
        _C.set_isa(before)


def _problem(rows: int, model: Model, dtype: torch.dtype, plan: Plan) -> Problem:
    h = Head(rows, model, dtype, plan)
    products = h.products()
    three, four = 3 * h.products_flops, 4 * h.products_flops
    runs: dict[str, tuple[Callable[[], Tensor], int]] = {
        "torch": (lambda: h.through(_unfused), three),
        "mbkern": (lambda: h.through(M.linear_cross_entropy, grad_scale=1.0), three),
        "mbkern into a buffer": (
            lambda: h.through(M.linear_cross_entropy, accumulate_into=h.buffer), four,
        ),
        "mbkern imperative": (h.imperative, three),
        "mbkern split-invariant": (lambda: h.imperative(split_invariant=True), three),
    }  # fmt: skip
    skipped = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        runs["torch chunked"] = (lambda: h.through(_chunked), three)
    else:
        skipped["torch chunked"] = f"torch {torch.__version__} has none"
    if "avx2" in _C.isas() and _C.isa() != "avx2" and plan.device == "cpu":
        runs["mbkern split-invariant (avx2)"] = (lambda: _split_on("avx2", h), three)
    there, absent = peers.found(peers.HEADS, plan.device)
    for name, function in there.items():
        runs[name] = (partial(h.through, function), three)
    ways = [
        Way(name, run, h.drop, h.error, flops=flops, isa="avx2" if name.endswith("(avx2)") else "")
        for name, (run, flops) in runs.items()
    ]
    ways += [
        Way("limit: three products", lambda: products(1), h.drop, flops=three, limit=True),
        Way("limit: four products", lambda: products(2), h.drop, flops=four, limit=True),
    ]
    return Problem(ways, 4 * TOLERANCE[dtype], {**absent, **skipped})


def cases(plan: Plan) -> list[Case]:
    """GPT-2 and Qwen on a CPU (64 rows of GPT-2: short), Llama as well on a GPU."""
    if plan.device == "cuda":
        sizes = [(8192, GPT2), (8192, QWEN), (4096, LLAMA), (2048, LLAMA_8B)]
    else:
        sizes = [(64, GPT2)] if plan.short else [(1024, GPT2), (256, QWEN)]
    found = []
    for rows, model in sizes:
        if plan.model and plan.model != model.name:
            continue
        for dtype in ("float32",) if plan.short else ("float32", "bfloat16"):
            shape = (rows, model.features, model.classes)
            build = partial(_problem, rows, model, dtype_of(dtype))
            name = f"{model.name} ({rows}, {model.features}) x {model.classes}"
            found.append(Case(SUITE, name, shape, dtype, build, rows, "rows"))
    return found
