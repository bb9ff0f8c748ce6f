"""The cases of ``python -m mbkern selftest``: fixed inputs, and the calls that are made with them.

Inputs come from integer hashes and bit patterns: no random generator and no libm has a say.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbkern import functional
from mbkern._loss_and_grad import loss_and_grad
from mbkern._loss_sum import LossSum
from mbkern._losses import Loss, Parameter, find

#: Integer of the same size, bits of exponent and mantissa.
FORMATS = {
    torch.float32: (torch.int32, 8, 23),
    torch.bfloat16: (torch.int16, 8, 7),
    torch.float16: (torch.int16, 5, 10),
    torch.float64: (torch.int64, 11, 52),
}
Outputs = dict[str, Tensor]

# ---- inputs --------------------------------------------------------------------------------------


def hashes(seed: int, n: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea & Flood 2014): n numbers of 64 bits."""
    z = np.arange(n, dtype=np.uint64) + np.uint64(seed << 32)
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype, spread: float = 8.0) -> Tensor:
    """Multiples of a power of two in [-spread, spread), as many as ``dtype`` holds exactly."""
    bits = FORMATS[dtype][2] + 1
    k = (hashes(seed, int(np.prod(shape))) >> np.uint64(64 - bits)).astype(np.int64)
    values = (k - (1 << (bits - 1))).astype(np.float64) * (spread / (1 << (bits - 1)))
    return torch.from_numpy(values).to(dtype).reshape(shape)


def integers(seed: int, shape: tuple[int, ...], bound: int) -> Tensor:
    """Integers in [0, bound)."""
    values = (hashes(seed, int(np.prod(shape))) >> np.uint64(32)) % np.uint64(bound)
    return torch.from_numpy(values.astype(np.int64)).reshape(shape)


def special_values(dtype: torch.dtype) -> Tensor:
    """Zero, denormals, the ends of the normal range, one, infinity and two NaNs, of both signs."""
    integer, exponent, mantissa = FORMATS[dtype]
    infinity = ((1 << exponent) - 1) << mantissa
    one = ((1 << (exponent - 1)) - 1) << mantissa
    half = 1 << (mantissa - 1)
    found = [0, 1, half, 1 << mantissa, one, infinity - 1, infinity, infinity | 1, infinity | half]
    sign = -1 << (exponent + mantissa)
    return torch.tensor(found + [k + sign for k in found], dtype=integer).view(dtype)


def patterns(double: bool) -> NDArray[Any]:
    """Numbers of every sign and exponent, infinities and NaNs, half of them not far from one."""
    n, odd = 1 << 18, 12345  # the last vectors of every width are partial
    bits = 64 if double else 32
    exponent = 11 if double else 8
    everywhere = hashes(20, n + odd) >> np.uint64(64 - bits)
    mantissa = np.uint64((1 << (bits - 1 - exponent)) - 1)
    one = (1 << (exponent - 1)) - 1
    near = (hashes(21, n) % np.uint64(24) + np.uint64(one - 16)) << np.uint64(bits - 1 - exponent)
    sign = (everywhere[:n] >> np.uint64(bits - 1)) << np.uint64(bits - 1)
    both = np.concatenate((everywhere, (everywhere[:n] & mantissa) | near | sign))
    edges = np.array([0, 1, 2], dtype=np.uint64)
    top = np.uint64(((1 << exponent) - 1) << (bits - 1 - exponent))
    both = np.concatenate((both, edges, top - edges, top + edges))
    return both.view(np.float64) if double else both.astype(np.uint32).view(np.float32)


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call. ``with_`` lists options and properties of the input, each a word."""

    name: str
    shape: tuple[int, ...]
    mode: str = "fresh"  # or inplace, accumulate, mean, backward, reduced
    with_: str = ""
    layout: str = "contiguous"  # or channels_last, transposed (dimension 1 outermost), gaps
    index: torch.dtype = torch.int64


ROWS = [
    Case("one column", (19, 1)),
    Case("two columns", (67, 2), "inplace", index=torch.uint8),
    Case("short rows", (7001, 10), with_="ignored", index=torch.int8),
    Case("short rows in place", (35, 33), "inplace", "ignored", index=torch.int16),
    Case("short rows mean", (41, 21), "mean", "weight sample smoothing ignored"),
    Case("short rows accumulated", (37, 63), "accumulate", "z softcap sample"),
    Case("short rows backward", (33, 64), "backward", "smoothing weight z ignored"),
    Case("short special values", (600, 4), with_="lattice"),
    Case("short special backward", (600, 3), "backward", "lattice smoothing"),
    Case("short probabilities", (29, 17), with_="probabilities weight smoothing sample"),
    Case("images", (3, 21, 11, 13), with_="ignored sample"),
    Case("images channels last", (3, 21, 5, 7), "inplace", "smoothing", "channels_last"),
    Case("images transposed", (5, 70, 3, 5), "mean", "softcap z", "transposed", torch.int32),
    Case("images of 600 classes", (3, 600, 2, 3), "accumulate", "smoothing"),
    Case("65 columns", (23, 65)),
    Case("confident rows", (21, 513), "inplace", "confident"),
    Case("long rows", (19, 5003), with_="ignored"),
    Case("long rows in place", (6, 4096), "inplace", "ignored z"),
    Case("long rows mean", (11, 1025), "mean", "weight sample smoothing ignored", "gaps"),
    Case("long rows accumulated", (9, 2047), "accumulate", "softcap sample", index=torch.int32),
    Case("long rows backward", (9, 1999), "backward", "softcap smoothing z"),
    Case("long rows by columns", (13, 700), "mean", "z weight", "transposed"),
    Case("long special values", (72, 130), with_="sprinkled"),
    Case("long special backward", (36, 330), "backward", "sprinkled smoothing z"),
    Case("long probabilities", (12, 1090), with_="probabilities weight smoothing z"),
    Case("long probabilities backward", (7, 300), "backward", "probabilities softcap", "gaps"),
    Case("reduced", (301, 77), "reduced", "weight sample ignored smoothing"),
]
POINTWISE = [
    Case("elements", (40001,)),
    Case("elements of every size", (3001,), with_="wide"),
    Case("pairs of special values", (18, 18), with_="lattice"),
    Case("in place", (31, 17), "inplace", "sample"),
    Case("mean", (1237,), "mean", "sample"),
    Case("accumulated", (5, 7, 77), "accumulate"),
    Case("channels last", (3, 5, 7, 11), "mean", "sample", "channels_last"),
    Case("transposed", (33, 129), "accumulate", "sample", "transposed"),
    Case("backward", (3, 777), "backward", "sample", "gaps"),
    Case("other parameters", (2003,), with_="parameters"),
    Case("reduced", (20011,), "reduced", "sample"),
]


MULTIROW = [
    Case("one column", (19, 1)),
    Case("short rows", (301, 10), with_="ignored sample"),
    Case("short special values", (90, 4), with_="lattice"),
    Case("images", (3, 21, 5, 7), "mean", "sample", "channels_last"),
    Case("in place", (23, 65), "inplace"),
    Case("long rows", (9, 2047), "mean", "ignored", index=torch.int32),
    Case("accumulated", (13, 700), "accumulate", "sample", "transposed"),
    Case("backward", (17, 330), "backward", "", "gaps"),
    Case("short rows, other parameters", (301, 10), with_="parameters"),
    Case("long rows, other parameters", (9, 330), with_="parameters"),
    Case("long special values", (36, 130), with_="sprinkled"),
    Case("reduced", (101, 77), "reduced", "sample"),
]

#: The element-wise cases that see what a formula does, and not only what its loop does.
FORMULA = (
    "elements of every size", "pairs of special values", "in place", "mean", "accumulated",
    "backward", "other parameters",
)  # fmt: skip


def _arrange(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        return torch.cat((tensor, tensor[:, :3]), dim=1)[:, : tensor.shape[1]]
    return tensor


def make(kernel: str, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs and options of a case."""
    shape, words = case.shape, case.with_.split()
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    loss = find(kernel)
    row = loss.kind != "pointwise"
    items = (shape[0], *shape[2:]) if row else shape
    x, special = numbers(1, shape, dtype), special_values(dtype)
    target = numbers(2, shape, dtype)
    if "lattice" in words:
        x = special[integers(3, shape, len(special))] if row else special[:, None].repeat(1, 18)
        target = target if row else special.repeat(18, 1)
    if "wide" in words:  # losses below, within and above the bins of exact sums
        small = dtype is torch.float16
        power = integers(8, shape, 15 if small else 60) - (10 if small else 40)
        factor = ((power + 1023) << 52).view(torch.float64)
        x, target = (x.double() * factor).to(dtype), torch.zeros_like(x)
    data: dict[str, Any] = {"options": {}}
    if row and "probabilities" in words:
        target = numbers(4, shape, dtype, 0.25).abs()
    elif row:
        target = integers(4, items, min(shape[1], 127))
        if "confident" in words:
            x.scatter_add_(1, target[:, None], torch.full_like(x, 24.0))
        if "ignored" in words and loss.ignores:
            target[integers(5, items, 4) == 0] = 101
            data["options"]["ignore_index"] = 101
        target = target.to(case.index)
    if "sprinkled" in words:
        rows = torch.arange(len(x))
        x[rows, integers(6, (len(x),), shape[1])] = special[rows % len(special)]
    extras = {
        "smoothing": ("label_smoothing", 0.1),
        "z": ("z_loss", 1e-3),
        "softcap": ("softcap", 7.0),
    }
    data["options"].update(extras[word] for word in words if word in extras)
    if "parameters" in words:
        data["options"].update((name, _another(p)) for name, p in loss.parameters.items())
    if "weight" in words:
        data["options"]["weight"] = numbers(7, (shape[1],), compute, 2.0).abs()
    data["sample_weight"] = numbers(8, items, compute, 4.0).abs() if "sample" in words else None
    if loss.kind == "pointwise":
        x, target = _within_domain(kernel, x, target)
        if loss.arguments[2:] == ("target",):
            data["options"]["target"] = numbers(11, shape, dtype).sign()
        elif loss.arguments[2:]:
            data["options"][loss.arguments[2]] = numbers(11, shape, dtype, 4.0).abs()
    data["incoming"] = numbers(9, items, dtype, 2.0)
    data["input"] = _arrange(x, case.layout)
    more = _row_tensors(loss, shape, dtype, target) if loss.kind == "multirow" else {
        name: data["options"].pop(name, target) for name in loss.arguments[1:]
    }  # fmt: skip
    data["more"] = {
        name: _arrange(t, case.layout) if t.dim() == x.dim() else t for name, t in more.items()
    }
    data["buffer"] = _arrange(numbers(10, shape, compute), case.layout)
    return data


def _another(parameter: Parameter) -> float | bool | str:
    """A value that is not the default one: a flag is turned, other numbers get larger."""
    default = parameter.default
    if isinstance(default, str):
        return parameter.choices[-1]
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int) else default + 0.375


def _row_tensors(
    loss: Loss, shape: tuple[int, ...], dtype: torch.dtype, target: Tensor
) -> dict[str, Tensor]:
    """The tensors of a loss of rows after the first; ``target`` holds class indices."""
    more = {
        name: numbers(12 + k, shape, dtype)
        for k, name in enumerate(loss.arguments[1 : loss.inputs])
    }
    if loss.name == "multilabel_soft_margin_loss":
        more["target"] = more["target"].abs() / 8
    if loss.target == "index":
        more["target"] = target
    elif loss.target == "label":
        more["target"] = numbers(14, tuple(target.shape), dtype).sign()
    elif loss.target == "list":
        count = shape[1]
        rows = integers(15, shape, min(count, 127)).movedim(1, -1)
        rows[torch.arange(count).expand(rows.shape) >= min(count, 3)] = -1
        more["target"] = rows.movedim(-1, 1)
    return more


def _within_domain(kernel: str, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs that the losses with a domain do not refuse."""
    if kernel == "binary_cross_entropy":
        return x.abs() / 8, target.abs() / 8
    return x, target


def _piece(
    kernel: str, mode: str, data: dict[str, Any], cut: slice, total: LossSum | None
) -> Outputs:
    """Losses and gradients of one piece of the batch, the losses added to ``total``."""
    x = data["input"][cut]
    options = dict(data["options"])
    more = {name: tensor[cut] for name, tensor in data["more"].items()}
    if data["sample_weight"] is not None:
        options["sample_weight"] = data["sample_weight"][cut]
    if mode == "reduced":
        function = getattr(functional, kernel)
        return {
            f"{how} {kind}": function(x, **more, reduction=how, loss_dtype=kind, **options).view(1)
            for how in ("sum", "mean")
            for kind in FORMATS
        }
    if mode == "backward":
        leaf = x.detach().requires_grad_()
        losses = getattr(functional, kernel)(leaf, **more, reduction="none", **options)
        losses.backward(data["incoming"][cut])
        assert leaf.grad is not None
        return {"loss": losses.detach(), "gradient 0": leaf.grad}
    out = None
    if mode == "inplace":
        x = out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    elif mode == "accumulate":
        out = data["buffer"][cut].clone(memory_format=torch.preserve_format)
    if mode == "mean":
        options.update(reduction="mean", denominator=37.0, scale=0.3)
    else:
        options.update(reduction="none", loss_dtype=data["buffer"].dtype)
    loss = find(kernel)
    many = loss.kind != "row" and out is None
    losses, grad = loss_and_grad(
        kernel,
        x,
        argnums=loss.differentiable if many else (0,),
        grad_out=None if out is None else (out,),
        accumulate=mode == "accumulate",
        loss_sum=total,
        **more,
        **options,
    )
    outputs = {f"gradient {argument}": g for argument, g in enumerate(grad)}
    return outputs if mode == "mean" else {"loss": losses, **outputs}


def cases(kernel: str, dtype: torch.dtype) -> list[Case]:
    """The cases of a kernel. For the reduced loss of float64 no bits are promised."""
    kind = find(kernel).kind
    found = ROWS if kind == "row" else MULTIROW if kind == "multirow" else POINTWISE
    if kind == "pointwise" and kernel != "mse_loss":  # the rest differs in its formula only
        found = [case for case in found if case.name in FORMULA]
    if kernel == "binary_cross_entropy":  # which refuses what is no probability
        found = [case for case in found if not {"lattice", "wide"} & set(case.with_.split())]
    if find(kernel).is_flat or find(kernel).flattens:
        found = [case for case in found if len(case.shape) == 2]
    return [case for case in found if dtype is not torch.float64 or case.mode != "reduced"]


def compute(kernel: str, case: Case, data: dict[str, Any], pieces: list[slice]) -> Outputs:
    """All outputs of a case, put together from the pieces of the batch."""
    input = data["input"]
    total = None if input.dtype is torch.float64 else LossSum(input.device)
    parts = [_piece(kernel, case.mode, data, cut, total) for cut in pieces]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if total is not None:
        outputs["exact sum"] = total.state
    return outputs


def cuts(case: Case) -> dict[str, list[slice]]:
    """Ways to cut the batch: whole, single items, and pieces of growing size."""
    n = case.shape[0]
    found = {"whole": [slice(0, n)]}
    if case.mode == "reduced":
        return found
    if n <= 64:
        found["single items"] = [slice(i, i + 1) for i in range(n)]
    ends = [0, 1]
    while ends[-1] < n:
        ends.append(min(n, 2 * ends[-1] - ends[-2] + 1 + ends[-1] // 8))
    found["ragged"] = [slice(a, b) for a, b in pairwise(ends)]
    return found
