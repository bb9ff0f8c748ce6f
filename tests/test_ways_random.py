"""A random loss with random options, dtypes and layouts, called in a random way, beside its formula
in fp64. MBKERN_ROUNDS=20000 plays as many rounds."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from case import Case
from cases import CASES, DTYPES
from row_case import RowCase
from row_cases import ROW_CASES
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import mbkern

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDS = int(os.environ.get("MBKERN_ROUNDS", "250"))
FIRST = 4099  # three of the next 250 found targets that were written to
ROWS = ((5,), (4, 7), (3, 1), (2, 130))
IMAGES = ((2, 5, 3), (2, 4, 2, 3))
ELEMENTS = ((), (7,), (4, 5), (2, 3, 2, 2), (530,))
EPS = {torch.float32: 2**-23, torch.float64: 2**-52, torch.bfloat16: 2**-8, torch.float16: 2**-11}
Tensors = dict[str, Tensor]
Grads = tuple[Tensor | None, ...]


@dataclass
class Call:
    """One call: all tensors by name, which of them are differentiated, and the other options."""

    case: Case | RowCase
    tensors: Tensors
    names: tuple[str, ...]
    options: dict[str, Any]
    extras: dict[str, Any]
    random: random.Random

    def loss(self, tensors: Tensors) -> Tensor:
        function = getattr(mbkern.functional, self.case.name)
        result: Tensor = function(**tensors, **self.options, **self.extras)
        return result

    def of(self, *given: Tensor) -> Tensor:
        """As a function of the tensors that are differentiated."""
        return self.loss(self.tensors | dict(zip(self.names, given, strict=True)))

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors[n].detach().requires_grad_() for n in self.names)

    def formula(self, *given: Tensor) -> Tensor:
        wide = {n: t.double() if t.is_floating_point() else t for n, t in self.tensors.items()}
        wide |= dict(zip(self.names, given, strict=True))
        if isinstance(self.case, Case):
            first, second = (wide.pop(n) for n in self.case.arguments[:2])
            return self.case.reference(first, second, **wide, **self.options)
        return self.case.reference(**wide, **self.options)

    def expected(self, incoming: Tensor) -> tuple[Tensor, Grads]:
        leaves = tuple(self.tensors[n].detach().double().requires_grad_() for n in self.names)
        value = self.formula(*leaves)
        return value, torch.autograd.grad(value, leaves, incoming.double(), allow_unused=True)


def _laid_out(t: Tensor, choice: random.Random) -> Tensor:
    """The same numbers in another place or order of memory."""
    way = choice.choice(["as it is", "permuted", "strided", "negated"])
    if way == "permuted" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "strided" and t.dim() > 0:
        view = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))[..., 1::2]
        return view.copy_(t)
    return torch._neg_view(-t) if way == "negated" and t.is_floating_point() else t


def _call(seed: int) -> Call:
    choice = random.Random(seed)
    case = choice.choice([*CASES, *ROW_CASES])
    of_rows = isinstance(case, RowCase) or case.has_rows
    shapes = ROWS + (IMAGES if getattr(case, "images", True) else ()) if of_rows else ELEMENTS
    if case.name in ("info_nce_loss", "dice_loss"):
        shapes = ROWS[1:2]
    shape, variation = choice.choice(shapes), choice.choice(case.variations)
    sample: Any = case.sample(shape, choice.choice(DTYPES), variation, seed=seed % 1000)  # type: ignore[arg-type]
    tensors = case.tensors(sample) if isinstance(case, Case) else dict(sample.tensors)
    options = dict(sample.options)
    tensors |= {n: options.pop(n) for n in list(options) if isinstance(options[n], Tensor)}
    tensors = {n: _laid_out(t, choice) for n, t in tensors.items()}
    options["reduction"] = choice.choice(["none", "mean", "mean", "sum"])
    if options["reduction"] != "mean":
        options.pop("denominator", None)
    elif choice.random() < 0.3:
        options["denominator"] = choice.choice([7, 3.25, torch.tensor(6), torch.tensor(5.5)])
    wanted = case.differentiable if isinstance(case, Case) else case.inputs
    can = [n for n in tensors if n in wanted]
    names = tuple(n for n in can if choice.random() < 0.7) or (can[0],)
    extras = {"grad_scale": 4.0} if choice.random() < 0.2 else {}
    return Call(case, tensors, names, options, extras, choice)


def _incoming(value: Tensor, call: Call) -> Tensor:
    if value.dim() == 0:
        return torch.tensor(call.random.choice([1.0, 1.0, -0.75, 3.0]), dtype=value.dtype)
    return torch.linspace(-1, 1, value.numel() * 2).to(value.dtype)[::2].reshape(value.shape)


# ---- ways: each returns the loss, the incoming gradient and the gradients ------------------------

Result = tuple[Tensor, Tensor, Grads]
Forward = Callable[..., Tensor]


def _graph(call: Call, forward: Forward, **options: Any) -> Result:
    leaves = call.leaves()
    value = forward(*leaves)
    incoming = _incoming(value, call)
    found = torch.autograd.grad(value, leaves, incoming, allow_unused=True, **options)
    return value, incoming, found


def plain(call: Call) -> Result:
    return _graph(call, call.of)


def twice(call: Call) -> Result:
    leaves = call.leaves()
    value = call.of(*leaves)
    incoming = _incoming(value, call)
    first = torch.autograd.grad(value, leaves, incoming * 2, retain_graph=True)
    second = torch.autograd.grad(value, leaves, incoming)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b * 2)
    return value, incoming, second


def by_formula(call: Call) -> Result:
    return _graph(call, call.of, create_graph=True)


def checkpointed(call: Call) -> Result:
    reentrant = call.random.random() < 0.5
    return _graph_backward(call, lambda *t: checkpoint(call.of, *t, use_reentrant=reentrant))


def _graph_backward(call: Call, forward: Forward) -> Result:
    leaves = call.leaves()
    value = forward(*leaves)
    incoming = _incoming(value, call)
    value.backward(incoming)
    return value, incoming, tuple(t.grad for t in leaves)


def offloaded(call: Call) -> Result:
    with torch.autograd.graph.save_on_cpu():
        return _graph(call, call.of)


def overwritten(call: Call) -> Result:
    """``inplace``, over what the input's gradient does not need."""
    name = next(iter(call.tensors))
    if name not in call.names or call.tensors[name].is_neg():
        return plain(call)
    call.extras["inplace"] = True
    return _graph(call, lambda *t: call.of(*(u.clone() for u in t)))


def transformed(call: Call) -> Result:
    tensors = tuple(call.tensors[n] for n in call.names)
    value, pull = torch.func.vjp(call.of, *tensors)
    incoming = _incoming(value, call)
    return value, incoming, pull(incoming)


def mapped(call: Call) -> Result:
    """Two calls at once; the second with half of what is differentiated."""
    leaves = call.leaves()
    many = tuple(torch.stack((t, t), -1) for t in leaves)
    value = torch.vmap(call.of, in_dims=-1)(*many)
    incoming = _incoming(value[0], call)
    both = torch.stack((incoming, torch.zeros_like(incoming)))
    return value[0], incoming, torch.autograd.grad(value, leaves, both)


def traced(call: Call) -> Result:
    given = tuple(call.tensors[n].detach().resolve_neg() for n in call.names)
    return _graph(call, make_fx(call.of)(*given))


def pushed(call: Call) -> Result:
    """Forward mode: the tangent is compared here, the rest by a plain call."""
    tensors = tuple(call.tensors[n].detach() for n in call.names)
    tangents = tuple(torch.linspace(-1, 2, t.numel()).reshape(t.shape).to(t) for t in tensors)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, (t.resolve_neg() for t in tensors), tangents)
        tangent = forward_ad.unpack_dual(call.of(*duals)).tangent
    wide = tuple(t.double() for t in tensors)
    _, want = torch.autograd.functional.jvp(call.formula, wide, tuple(t.double() for t in tangents))
    if not want.isnan().all():  # the mean of no items, whose derivatives are 0 here
        _compare(tangent, want, "tangent", 400)
    return _graph(call, call.of)


WAYS = (
    plain, twice, by_formula, checkpointed, offloaded, overwritten, transformed, mapped, traced,
    pushed,
)  # fmt: skip


def _compare(got: Tensor | None, want: Tensor | None, label: str, ulps: float = 40) -> None:
    if got is None or want is None:
        other = want if got is None else got
        assert other is None or not other.any(), label
        return
    eps = EPS[got.dtype] if got.dtype is torch.float64 else max(EPS[got.dtype], 2**-23)
    wide = got.detach().double()
    torch.testing.assert_close(
        wide, want.detach(), rtol=0, equal_nan=True, msg=lambda text: f"{label}: {text}",
        atol=ulps * eps * max(1.0, float(want.detach().nan_to_num(0, 0, 0).abs().max())),
    )  # fmt: skip


def test_random_calls() -> None:
    for seed in range(FIRST, FIRST + ROUNDS):
        call = _call(seed)
        way = call.random.choice(WAYS)
        if call.case.name == "binary_cross_entropy" and way is pushed:
            continue  # torch's own has a relative error of 1e-12 there
        label = f"{seed}: {call.case.name} {way.__name__} {call.names} {call.options}"
        value, incoming, grads = way(call)
        want, expected = call.expected(incoming)
        # Several arguments of several dtypes: the coarsest is what they were rounded to.
        _compare(value, want, label)
        for name, grad, right in zip(call.names, grads, expected, strict=True):
            assert grad is None or grad.dtype is call.tensors[name].dtype
            _compare(grad, right, f"{label}: {name}")
