"""The loss family: loss and gradient of element-wise losses and of losses of rows, against torch.

Timed as in the suite cross-entropy. Where torch has no such function, its way is the usual chain of
operations. The limit of what works in place is ``x.add_(y)`` over the same buffers: two reads and
one write. At 2^12 elements a sample is the mean of a block of calls: what is measured there is the
host's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness.allocator import DEFAULT, RECYCLED
from harness.results import Entry, Group
from harness.settings import NONE, Settings, progress
from harness.timing import Way, interleave
from torch import Tensor

import mbkern
import mbkern.functional as M
from suites.problem import TOLERANCE

STATES = (DEFAULT, RECYCLED)
ELEMENTS, ROWS = "elements", "rows"
TORCH, COMPILED = "torch", "torch.compile"
AUTOGRAD, IN_PLACE = "mbkern autograd", "mbkern in place"
LIMIT = "limit: add_"
LARGE, SMALL = 1 << 24, 1 << 12
CALLS = 100

Function = Callable[..., Tensor]


def _log_p(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def _focal(x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    q = p * (1 - y) + (1 - p) * y
    return ((0.25 * y + 0.75 * (1 - y)) * q**2 * ce).mean()


def _log_cosh(x: Tensor, y: Tensor) -> Tensor:
    r = x - y
    return (r + F.softplus(-2 * r) - 0.6931471805599453).mean()


def _quantile(x: Tensor, y: Tensor) -> Tensor:
    r = y - x
    return (0.9 * torch.relu(r) + 0.1 * torch.relu(-r)).mean()  # 0 is the derivative at 0


def _softmax_focal(x: Tensor, t: Tensor) -> Tensor:
    log_p = _log_p(x).gather(-1, t[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def _kl(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(_log_p(x), _log_p(y), reduction="batchmean", log_target=True)


def _js(x: Tensor, y: Tensor) -> Tensor:
    p, q = x.softmax(-1), y.softmax(-1)
    m = (0.5 * (p + q)).log()
    return 0.5 * (F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean"))


def _tv(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x.softmax(-1) - y.softmax(-1)).abs().sum(-1).mean()


def _entropy(x: Tensor) -> Tensor:
    log_p = _log_p(x)
    return -(log_p.exp() * log_p).sum(-1).mean()


@dataclass(frozen=True)
class Loss:
    """One loss: our name and options, torch's way, and the kinds of its other tensors."""

    name: str
    torch: Function
    others: tuple[str, ...]
    exponential: bool = False  # whether either side needs one, or a logarithm
    options: tuple[tuple[str, Any], ...] = ()

    def ours(self, *tensors: Tensor) -> Tensor:
        result: Tensor = getattr(M, self.name)(*tensors, reduction="mean", **dict(self.options))
        return result


_ELEMENTS = (
    Loss("mse_loss", F.mse_loss, ("real",)),
    Loss("huber_loss", F.huber_loss, ("real",)),
    Loss("l1_loss", F.l1_loss, ("real",)),
    Loss("smooth_l1_loss", F.smooth_l1_loss, ("real",)),
    Loss("hinge_embedding_loss", F.hinge_embedding_loss, ("sign",)),
    Loss("quantile_loss", _quantile, ("real",), False, (("quantile", 0.9),)),
    Loss("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, ("share",), True),
    Loss("soft_margin_loss", F.soft_margin_loss, ("sign",), True),
    Loss("poisson_nll_loss", F.poisson_nll_loss, ("share",), True),
    Loss("gaussian_nll_loss", F.gaussian_nll_loss, ("real", "positive"), True),
    Loss("kl_div", F.kl_div, ("share",), True),
    Loss("log_cosh_loss", _log_cosh, ("real",), True),
    Loss("sigmoid_focal_loss", _focal, ("share",), True),
)
_ROWS = (
    Loss("nll_loss", F.nll_loss, ("class",)),
    Loss("multi_margin_loss", F.multi_margin_loss, ("class",)),
    Loss("multilabel_soft_margin_loss", F.multilabel_soft_margin_loss, ("share",), True),
    Loss("cosine_embedding_loss", F.cosine_embedding_loss, ("real", "label")),
    Loss("triplet_margin_loss", F.triplet_margin_loss, ("real", "real")),
    Loss("softmax_focal_loss", _softmax_focal, ("class",), True),
    Loss("kl_div_with_logits", _kl, ("real",), True),
    Loss("js_div_with_logits", _js, ("real",), True),
    Loss("tv_distance_with_logits", _tv, ("real",), True),
    Loss("entropy_with_logits", _entropy, (), True),
)
_COMPILED = ("mse_loss", "huber_loss", "binary_cross_entropy_with_logits")
_PAIRS = ("kl_div_with_logits", "js_div_with_logits", "tv_distance_with_logits")


def _tensors(loss: Loss, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)

    def make(kind: str) -> Tensor:
        if kind == "class":
            return torch.randint(shape[1], shape[:1], generator=random)
        x = torch.rand(shape[:1] if kind == "label" else shape, generator=random)
        if kind in ("sign", "label"):
            x = torch.where(x < 0.5, -1.0, 1.0)
        elif kind == "real":
            x = (x - 0.5) * 6
        elif kind == "positive":
            x += 0.1
        return x.to(dtype)

    return [make(kind) for kind in ("real", *loss.others)]


def _gradient(function: Function, x: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
    loss = function(x, *others)
    loss.backward()
    grad = x.grad
    assert grad is not None
    x.grad = None
    return loss.detach(), grad


def _error(result: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-300))
        for a, b in zip(result, exact, strict=True)
    )


def _large(
    suite: str, loss: Loss, shape: tuple[int, ...], dtype: torch.dtype, threads: int,
    settings: Settings,
) -> Group:  # fmt: skip
    pristine, *others = _tensors(loss, shape, dtype)
    x, plain = pristine.clone().requires_grad_(), pristine.clone()
    few = slice(0, 1 << 16) if len(shape) == 1 else slice(0, 64)
    wide = [t[few].double() if t.is_floating_point() else t[few] for t in (pristine, *others)]
    exact = _gradient(loss.torch, wide[0].requires_grad_(), wide[1:])

    def check(function: Function) -> float:
        part = pristine[few].clone().requires_grad_()
        return _error(_gradient(function, part, [t[few] for t in others]), exact)

    options = dict(loss.options)
    runs: dict[str, Callable[[], Any]] = {
        TORCH: lambda: _gradient(loss.torch, x, others),
        AUTOGRAD: lambda: _gradient(loss.ours, x, others),
        IN_PLACE: lambda: mbkern.loss_and_grad(
            loss.name, plain, *others, grad_out=plain, **options
        ),
    }
    errors = {TORCH: check(loss.torch), AUTOGRAD: check(loss.ours)}
    errors[IN_PLACE] = errors[AUTOGRAD]  # the same bits: tests/test_inplace.py
    if loss.name in _COMPILED and dtype is torch.float32 and settings.compile != NONE:
        torch._dynamo.reset()
        compiled = torch.compile(loss.torch, dynamic=False)
        runs[COMPILED] = lambda: _gradient(compiled, x, others)
        errors[COMPILED] = errors[TORCH]
    if others and others[0].shape == plain.shape:
        runs[LIMIT] = lambda: plain.add_(others[0])
        errors[LIMIT] = 0.0

    def restore() -> None:
        plain.copy_(pristine)

    ways = [Way(name, run, restore) for name, run in runs.items()]
    entries = interleave(ways, settings.effort(1.5, least=5))
    for entry in entries:
        entry.error = errors[entry.name]
        entry.correct = entry.error <= TOLERANCE[dtype] * 4
    short = str(dtype).removeprefix("torch.")
    size = f"2^{shape[0].bit_length() - 1}" if len(shape) == 1 else str(shape)
    label = f"{loss.name} {size} {short}"
    return Group(suite, label, threads, settings.allocator, "ms", TORCH, entries, shape[-1], short)


def _small(loss: Loss, settings: Settings) -> Group:
    pristine, *others = _tensors(loss, (SMALL,), torch.float32)
    x = pristine.clone().requires_grad_()
    entries = [Entry(TORCH), Entry(AUTOGRAD)]
    rounds = settings.repeats or 15
    for index in range(rounds + 2):
        for entry, function in zip(entries, (loss.torch, loss.ours), strict=True):
            begin = time.perf_counter()
            for _ in range(CALLS):
                _gradient(function, x, others)
            elapsed = (time.perf_counter() - begin) / CALLS
            if index >= 2:
                entry.samples.append(elapsed * 1e6)
    return Group(
        "host-family", f"{loss.name} 2^12", 1, settings.allocator, "us", TORCH, entries, SMALL
    )


def run(settings: Settings) -> list[Group]:
    """Every loss at its sizes, on every number of threads."""
    groups = []
    quick = settings.quick
    size = (LARGE >> 4,) if quick else (LARGE,)
    for threads in settings.threads:
        torch.set_num_threads(threads)
        for loss in _ELEMENTS:
            for dtype in (torch.float32, torch.bfloat16):
                if loss.name in ("gaussian_nll_loss", "kl_div") and dtype is torch.bfloat16:
                    continue  # torch's own error is beyond any tolerance there
                progress(f"{loss.name} {dtype}", threads)
                groups.append(_large(ELEMENTS, loss, size, dtype, threads, settings))
        for loss in _ROWS:
            shapes = [(4096, 1000), (512, 32000)]
            if loss.name in _PAIRS:
                shapes = [(1024, 32000)]
            for shape in shapes[:1] if quick else shapes:
                progress(f"{loss.name} {shape}", threads)
                groups.append(_large(ROWS, loss, shape, torch.float32, threads, settings))
    torch.set_num_threads(1)
    groups += [_small(loss, settings) for loss in _ELEMENTS]
    return groups
