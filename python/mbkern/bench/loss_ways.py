"""Providers of a loss and its gradient: torch, torch.compile, mbkern, peers, and the limits.

Timed: the loss, its backward, and the memory of temporaries and of the gradient (taken, first
touched; temporaries given back). Not timed: restoring the input, dropping the gradient, compiling.
All providers read one buffer, and the copy that restores it comes before each of them, so that the
state of the caches is the same for all. Logits are shifted so that the largest is 0: the loss does
not change, and the bare exponential of a softmax's terms can run over the same buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mbkern
from mbkern import _C
from mbkern.bench import peers
from mbkern.bench.formulas import CROSS_ENTROPY, Formula, Function, tensors
from mbkern.bench.problem import TOLERANCE, Plan, Problem, dtype_of, worse
from mbkern.bench.timing import Way, replayed

TORCH, COMPILED = "torch", "torch.compile"
AUTOGRAD, IN_PLACE = "mbkern autograd", "mbkern in place"
_PIECE = 1 << 22  # elements that are compared at a time, so that fp64 copies stay small
LIMIT_PASS, LIMIT_EXP = "limit: bare pass", "limit: bare exp"


class LossProblem:
    """The tensors of one loss, the exact answer, and the ways to it.

    Attributes:
        leaf: what every way reads; requires grad.
        plain: the same memory outside autograd; ways that work in place overwrite it.
        others: the other tensors.
        bytes: that loss and gradient must move: every input read once, the gradient written once.
    """

    def __init__(self, formula: Formula, shape: tuple[int, ...], dtype: str, plan: Plan) -> None:
        self.formula, self.plan = formula, plan
        pristine, *others = tensors(formula, shape, dtype_of(dtype), plan.device)
        if formula is CROSS_ENTROPY:
            pristine -= pristine.max()
        self.pristine, self.others = pristine, others
        self.leaf = pristine.clone().requires_grad_()
        self.plain = self.leaf.detach()
        self.wide = [t.double() if t.is_floating_point() else t for t in others]
        exact = pristine.double().requires_grad_()
        loss = formula.torch(exact, *self.wide)
        (gradient,) = torch.autograd.grad(loss, exact)
        self.loss, self.gradient = loss.item(), gradient
        self.largest = gradient.abs().max().item()
        inputs = sum(t.numel() * t.element_size() for t in (pristine, *others))
        self.bytes = inputs + pristine.numel() * pristine.element_size()
        self.skipped: dict[str, str] = {}

    def restore(self) -> None:
        """Undo what the last run did: the input as the other ways saw it, and no gradient."""
        self.leaf.grad = None
        self.plain.copy_(self.pristine)

    def error(self, loss: Tensor | None, gradient: Tensor | None) -> float:
        """Largest error of the gradient over the largest gradient, or of the loss over the loss."""
        worst = 0.0
        if loss is not None:
            off = abs(loss.double().item() - self.loss)
            worst = worse(worst, off / max(abs(self.loss), 1e-30))
        if gradient is not None:
            pieces = (torch.split(t.reshape(-1), _PIECE) for t in (gradient, self.gradient))
            for ours, exact in zip(*pieces, strict=True):
                off = (ours.double() - exact).abs().max().item() / self.largest
                worst = worse(worst, off)
        return worst

    def through_autograd(self, name: str, function: Function, direction: str) -> Way:
        """The way of a function whose gradient is autograd's."""
        x, others, isa = self.leaf, self.others, self._isa(name)
        kept: list[Tensor] = []

        def forward() -> Tensor:
            return function(x, *others)

        def prepare() -> None:
            self._choose(isa)
            self.restore()
            kept.clear()
            if direction == "backward":
                kept.append(function(x, *others))

        def backward() -> Any:
            kept.pop().backward()  # type: ignore[no-untyped-call]
            return x.grad

        def both() -> tuple[Tensor, Any]:
            loss = function(x, *others)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss, x.grad

        runs: dict[str, Callable[[], Any]] = {
            "forward": forward, "backward": backward, "both": both,
        }  # fmt: skip
        checks: dict[str, Callable[[Any], float]] = {
            "forward": lambda r: self.error(r, None),
            "backward": lambda r: self.error(None, r),
            "both": lambda r: self.error(*r),
        }
        return Way(
            name, runs[direction], prepare, checks[direction], direction=direction, isa=isa,
            bytes=self.bytes if direction == "both" else 0,
        )  # fmt: skip

    def in_place(self, isa: str = "") -> Way:
        """Loss and gradient in one pass, the gradient over the input."""
        y, others = self.plain, self.others
        options = dict(self.formula.options)
        used = isa or self._isa(IN_PLACE)

        def prepare() -> None:
            self._choose(used)
            self.restore()

        return Way(
            f"{IN_PLACE} ({isa})" if isa else IN_PLACE,
            lambda: mbkern.loss_and_grad(self.formula.name, y, *others, grad_out=y, **options),
            prepare, lambda r: self.error(*r), isa=used, bytes=self.bytes, in_place=True,
        )  # fmt: skip

    def _isa(self, name: str) -> str:
        ours = name.startswith("mbkern") and self.plan.device == "cpu"
        return _C.isa() if ours else ""

    def _choose(self, isa: str) -> None:
        if isa and _C.isa() != isa:
            _C.set_isa(isa)

    def limits(self, threads: int) -> list[Way]:
        """What no way in place can be faster than."""
        y, others = self.plain, [t for t in self.others if t.shape == self.plain.shape]
        size = y.numel() * y.element_size()
        second = others[0] if others and others[0].dtype is y.dtype else None
        ways = [
            Way(LIMIT_PASS, y.neg_, self.restore, bytes=2 * size, limit=True)
            if second is None
            else Way(LIMIT_PASS, lambda: y.add_(second), self.restore, bytes=3 * size, limit=True)
        ]
        if self.formula is CROSS_ENTROPY and self.plan.device == "cpu":
            if threads == 1 and y.dtype is torch.float32:
                ways.append(self._bare_exp(size))
            else:
                self.skipped[LIMIT_EXP] = "measured in fp32 on one thread"
        return ways

    def _bare_exp(self, size: int) -> Way:
        y, isa = self.plain, _C.isa()
        address, n = y.data_ptr(), y.numel()

        def error(_: Any) -> float:
            return (y.double() - self.pristine.double().exp()).abs().max().item()

        return Way(
            LIMIT_EXP, lambda: _C.elementary(isa, "exp_nonpositive", False, address, address, n),
            self.restore, error, isa=isa, bytes=2 * size, limit=True,
        )  # fmt: skip


def loss_problem(
    formula: Formula,
    shape: tuple[int, ...],
    dtype: str,
    plan: Plan,
    *,
    direction: str = "both",
    tiers: bool = False,
    compiled: bool = False,
    limits: bool = True,
) -> Problem:
    """Every provider of one loss; ``tiers``: each instruction set of the machine as well."""
    p = LossProblem(formula, shape, dtype, plan)
    functions: dict[str, Function] = {TORCH: formula.torch}
    if compiled and plan.compile:
        torch._dynamo.reset()
        functions[COMPILED] = torch.compile(formula.torch, dynamic=False)
    elif direction == "both":
        p.skipped[COMPILED] = "see --compile" if compiled else "is not measured in this suite"
    functions[AUTOGRAD] = formula.ours
    if formula is CROSS_ENTROPY and len(shape) == 2:
        there, absent = peers.found(peers.LOSSES, plan.device)
        functions |= there
        p.skipped |= absent
    ways = [p.through_autograd(name, f, direction) for name, f in functions.items()]
    if direction == "both":
        ways.append(p.in_place())
        if plan.device == "cuda":
            ways.append(replayed(p.in_place()))
        if tiers and plan.device == "cpu":
            ways += [p.in_place(isa) for isa in _C.isas() if isa != _C.isa()]
        if limits:
            ways += p.limits(torch.get_num_threads())
    used = _C.isa()
    return Problem(
        ways, 4 * TOLERANCE[dtype_of(dtype)], p.skipped,
        TORCH, lambda: p._choose(used),
    )  # fmt: skip
