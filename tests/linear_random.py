"""The fused head's arguments by chance, and what they should give in float64."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern import functional as F

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def laid_out(r: random.Random, t: Tensor) -> Tensor:
    """The same values in another layout."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    kind = r.choice(["dense", "dense", "permuted", "cut", "steps", "offset", "negated"])
    if kind == "permuted":
        order = r.sample(range(t.dim()), t.dim())
        return t.permute(order).contiguous().permute([order.index(k) for k in range(t.dim())])
    if kind == "negated" and t.is_floating_point():
        return torch._neg_view((-t).contiguous())
    if kind in ("cut", "steps", "offset"):
        more = {"cut": [n + 1 for n in t.shape], "steps": [*t.shape, 2], "offset": [t.numel() + 3]}
        memory = torch.full(more[kind], 77, dtype=t.dtype)
        view = {
            "cut": lambda: memory[tuple(slice(0, n) for n in t.shape)],
            "steps": lambda: memory[..., 1],
            "offset": lambda: memory[3:].view(t.shape),
        }[kind]()
        return view.copy_(t)
    return t


@dataclass
class Case:
    """One call: its tensors, options, and what the reference needs to know of them."""

    r: random.Random
    tensors: dict[str, Tensor]  # x, w, and where there are: b, s
    target: Tensor
    options: dict[str, Any]
    items: tuple[int, ...]  # the shape of the unreduced loss
    is_index: bool
    autocast: torch.dtype | None = None

    @property
    def product(self) -> torch.dtype:
        """What the products are computed in."""
        dtype = self.autocast or self.tensors["x"].dtype
        wide = not self.is_index and self.target.dtype is torch.float64
        return torch.float64 if wide else dtype

    def context(self) -> Any:
        kind = self.autocast
        return contextlib.nullcontext() if kind is None else torch.autocast("cpu", kind)

    def head(self, tensors: dict[str, Tensor], **more: Any) -> Any:
        with self.context():
            return F.linear_cross_entropy(
                tensors["x"], tensors["w"], self.target, linear_bias=tensors.get("b"),
                **{"logit_scale": tensors.get("s"), **self.options, **more},
            )  # fmt: skip


def case(seed: int) -> Case:
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = r.choice(FLOATS)
    batch = tuple(r.choice([1, 2, 3, 5, 9]) for _ in range(r.choice([0, 1, 1, 2, 2, 3])))
    batch = r.choice([batch, batch, batch, (0,), (33,), (3, 0), (130,)]) if batch else batch
    inner: tuple[int, ...] = r.choice([(), (), (), (2,), (1, 3)]) if batch else ()
    classes, features = r.choice([1, 2, 3, 11, 64, 130, 1030]), r.choice([1, 2, 5, 16, 33, 300])

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = (numbers(*batch, features) * r.choice([0.3, 1, 3]) / math.sqrt(features)).to(dtype)
    t = {"x": x, "w": numbers(classes, *inner, features).to(dtype)}
    o: dict[str, Any] = {"reduction": r.choice(["mean", "mean", "sum", "none"])}
    autocast = r.choice([None, None, None, torch.bfloat16, torch.float16])
    if dtype is torch.float64:
        autocast = None
    elif autocast is not None and r.random() < 0.5:
        t["w"] = t["w"].float()  # a parameter, beside what the body has computed in 16 bits
    if r.random() < 0.5:
        t["b"] = numbers(classes, *inner).to(r.choice([dtype, dtype, torch.float32]))
    if r.random() < 0.2:
        t["s"] = torch.tensor(r.choice([0.7, -1.3]), dtype=r.choice([dtype, torch.float32]))
    elif r.random() < 0.2:
        o["logit_scale"] = r.choice([1.7, 0.0, -0.5, 1])
    items = [*batch, *inner]
    is_index = r.random() < 0.8
    if is_index:
        kind = r.choice([torch.int64, torch.int64, torch.int32, torch.int8, torch.uint8])
        y = torch.randint(min(classes, torch.iinfo(kind).max), items, generator=g).to(kind)
        ignored = r.choice([None, -1, 0, classes - 1, 255])
        number = -100 if ignored is None else ignored
        if torch.iinfo(kind).min <= number <= torch.iinfo(kind).max:
            y.masked_fill_(torch.rand(items, generator=g) < r.choice([0, 0.3, 1]), number)
        if ignored is not None:
            o["ignore_index"] = ignored
        if batch and r.random() < 0.2:
            o["shift"] = min(r.choice([1, 2]), batch[-1])
            items[len(batch) - 1] -= o["shift"]
    else:
        y = numbers(*batch, classes, *inner).softmax(len(batch)).to(r.choice(FLOATS))
    more = {
        "label_smoothing": lambda: r.choice([0.1, 1.0]),
        "z_loss": lambda: 0.01,
        "softcap": lambda: r.choice([2.0, 30.0]),
        "weight": lambda: laid_out(r, torch.rand(classes, generator=g).to(r.choice(FLOATS))),
        "sample_weight": lambda: laid_out(
            r, torch.rand([r.choice([n, n, 1]) for n in items], generator=g).to(r.choice(FLOATS))
        ),
        "split_invariant": lambda: True,
        "chunk_bytes": lambda: r.choice([1, 1000, 20000]),
    }
    o |= {name: make() for name, make in more.items() if r.random() < 0.25}
    if o["reduction"] == "mean" and r.random() < 0.3:
        o["denominator"] = r.choice([7.5, 50, torch.tensor(7.5), torch.tensor(50)])
    tensors = {name: laid_out(r, v) for name, v in t.items()}
    return Case(r, tensors, laid_out(r, y), o, tuple(items), is_index, autocast)


def reference(c: Case, t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss in float64, the logits, and how much of a gradient an item may have."""
    o, at, inner = c.options, t["x"].dim() - 1, c.tensors["w"].dim() - 2
    z = torch.tensordot(t["x"], t["w"], dims=([at], [inner + 1]))
    z = z + t["b"] if "b" in t else z
    scale = t.get("s", o.get("logit_scale", 1.0))
    logits = z * scale
    y = c.target.long() if c.is_index else c.target.double()
    if "shift" in o:
        length = logits.shape[at - 1] - o["shift"]
        logits = logits.narrow(at - 1, 0, length)
        y = y.narrow(at - 1, o["shift"], length)
    cap = o.get("softcap")
    top = logits if cap is None else cap * torch.tanh(logits / cap)
    classes, smooth = top.shape[at], o.get("label_smoothing", 0.0)
    of_class = o.get("weight", torch.ones(classes)).double()
    counts = y != o.get("ignore_index", -100) if c.is_index else torch.ones(c.items) == 1
    if c.is_index:
        index = torch.where(counts, y, 0)
        shares = torch.nn.functional.one_hot(index, classes).movedim(-1, at).double()
        in_mean = of_class[index]
    else:
        shares, in_mean = y, torch.ones(c.items, dtype=torch.float64)
    q = ((1 - smooth) * shares + smooth / classes) * of_class.view(-1, *[1] * inner)
    losses = -(q * top.log_softmax(at)).sum(at)
    losses = losses + o.get("z_loss", 0.0) * top.logsumexp(at).square()
    per_item = o.get("sample_weight", torch.ones(())).double() * counts
    losses = torch.where(counts, losses, 0.0) * per_item
    if o["reduction"] == "none":
        return losses, z, per_item
    total = losses.sum()
    if o["reduction"] == "sum":
        return total, z, per_item
    divisor = o.get("denominator")
    divisor = float((in_mean * per_item).sum() if divisor is None else divisor)
    return total / divisor, z, per_item / max(divisor, 1e-9)
