"""Split-invariant mode: the head's gradients have the same bits for every cut of the mini-batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import mbkern
from mbkern import _C
from mbkern import functional as F

pytestmark = pytest.mark.cpu
ROWS, FEATURES, CLASSES = 60, 33, 517


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    target = torch.randint(CLASSES, (ROWS,), generator=g)
    target[::7] = -100
    return {
        "x": torch.randn(ROWS, FEATURES, generator=g).to(dtype),
        "w": torch.randn(CLASSES, FEATURES, generator=g).to(dtype),
        "b": torch.randn(CLASSES, generator=g).to(dtype),
        "target": target,
    }


def imperative(t: dict[str, Tensor], cut: list[int], **more: Any) -> tuple[Tensor, ...]:
    """Way 3: added in place, at once."""
    dw, db, total = torch.zeros(CLASSES, FEATURES), torch.zeros(CLASSES), mbkern.LossSum()
    dxs = []
    for x, target in zip(t["x"].split(cut), t["target"].split(cut), strict=True):
        _, (dx, _, _) = mbkern.loss_and_grad(
            "linear_cross_entropy", x, t["w"], target, linear_bias=t["b"],
            argnums=("input", "linear_weight", "linear_bias"), grad_out=(None, dw, db),
            accumulate=True, denominator=50.0, loss_sum=total, split_invariant=True, **more,
        )  # fmt: skip
        dxs.append(dx)
    return total.value(50.0), torch.cat(dxs), dw, db


def recomputed(t: dict[str, Tensor], cut: list[int], **more: Any) -> tuple[Tensor, ...]:
    """Way 2: backward adds into the buffer; the bias's gradient is added by torch."""
    dw, dxs = torch.zeros(CLASSES, FEATURES), []
    w = t["w"].clone().requires_grad_()
    for x, target in zip(t["x"].split(cut), t["target"].split(cut), strict=True):
        leaf = x.clone().requires_grad_()
        F.linear_cross_entropy(
            leaf, w, target, linear_bias=t["b"], denominator=50.0, split_invariant=True,
            accumulate_into=dw, **more,
        ).backward()  # fmt: skip
        dxs.append(leaf.grad)
    return torch.cat(dxs), dw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [imperative, recomputed])
def test_cuts_threads_and_instruction_sets(way: Any, dtype: torch.dtype) -> None:
    t = tensors(dtype)
    cuts = [[60], [30, 30], [1] * 60, [59, 1], [7] * 8 + [4], [13, 0, 40, 7]]
    before, threads = _C.isa(), torch.get_num_threads()
    want: tuple[Tensor, ...] | None = None
    try:
        for isa, n, chunk in itertools.product(_C.isas(), (1, 2, 3), (None, 12 * CLASSES)):
            _C.set_isa(isa)
            torch.set_num_threads(n)
            for cut in cuts if n == 1 else cuts[1:4:2]:
                got = way(t, cut, chunk_bytes=chunk)
                want = got if want is None else want
                for k, (a, b) in enumerate(zip(got, want, strict=True)):
                    same = a.dtype is b.dtype and torch.equal(a.double(), b.double())
                    assert same, (isa, n, chunk, cut, k)
    finally:
        _C.set_isa(before)
        torch.set_num_threads(threads)


def test_accuracy_of_the_weight_gradient() -> None:
    """Against float64 on the same operands; the fast mode of bfloat16, too."""
    g = torch.Generator().manual_seed(9)
    x = torch.randn(2048, 64, generator=g).bfloat16()
    w = (torch.randn(300, 64, generator=g) / 8).bfloat16()
    target = torch.randint(300, (2048,), generator=g)
    z = TF.linear(x, w)
    _, grad = mbkern.loss_and_grad("cross_entropy", z, target)
    exact = grad.double().t() @ x.double()
    for split in (False, True):
        dw = torch.zeros(300, 64)
        mbkern.loss_and_grad(
            "linear_cross_entropy", x, w, target, argnums=1, grad_out=dw, accumulate=True,
            split_invariant=split,
        )  # fmt: skip
        if not split:  # G is the bfloat16 one of above
            assert (dw - exact).abs().max() <= 3e-6 * exact.abs().max()
        else:  # G is float32's
            leaf = w.double().requires_grad_()
            TF.cross_entropy(TF.linear(x.double(), leaf), target).backward()
            assert (dw - leaf.grad).abs().max() <= 1e-5 * leaf.grad.abs().max()


def test_training_with_a_new_cut_every_step() -> None:
    """A small language model: in split-invariant mode the head's gradient is bit for bit that of
    one pass, in fast mode the losses lie on the float64 ones."""
    text = torch.tensor(list(Path(TF.__file__).read_bytes()[:20000]))
    g = torch.Generator().manual_seed(1)

    def model(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Parameter]:
        torch.manual_seed(4)
        body = torch.nn.Sequential(
            torch.nn.Embedding(128, 16), torch.nn.TransformerEncoderLayer(
                16, 2, 32, dropout=0.0, batch_first=True)
        ).to(dtype)  # fmt: skip
        return body, torch.nn.Parameter(torch.randn(128, 16).to(dtype) / 4)

    body, head = model(torch.float32)
    wide_body, wide_head = model(torch.float64)
    parameters = [*body.parameters(), head]
    wide = [*wide_body.parameters(), wide_head]
    steps = [torch.optim.SGD(p, lr=0.2) for p in (parameters, wide)]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(24)
    for step in range(200):
        begin = int(torch.randint(len(text) - 200, (), generator=g))
        ids = text[begin : begin + 8 * 25].view(8, 25)
        for opt in steps:
            opt.zero_grad()
        hidden = body[1](body[0](ids[:, :-1]), src_mask=mask, is_causal=True)
        h = hidden.detach().reshape(-1, 16)
        target = ids[:, 1:].reshape(-1)
        size = int(torch.randint(1, 193, (), generator=g))
        grads = []
        for rows in (192, size):
            buffer = torch.zeros_like(head)
            dh = []
            for a, b in zip(h.split(rows), target.split(rows), strict=True):
                _, (d, _) = mbkern.loss_and_grad(
                    "linear_cross_entropy", a, head.detach(), b, argnums=(0, 1),
                    grad_out=(None, buffer), accumulate=True, denominator=192,
                    split_invariant=True,
                )  # fmt: skip
                dh.append(d)
            grads.append((buffer, torch.cat(dh)))
        assert torch.equal(grads[0][0], grads[1][0]), (step, size)
        assert torch.equal(grads[0][1], grads[1][1]), (step, size)
        # Fast mode trains.
        loss = sum(
            F.linear_cross_entropy(a, head, b, denominator=192)
            for a, b in zip(hidden.reshape(-1, 16).split(size), target.split(size), strict=True)
        )
        loss.backward()
        z = TF.linear(wide_body[1](wide_body[0](ids[:, :-1]), src_mask=mask.double(),
                                   is_causal=True), wide_head)  # fmt: skip
        exact = TF.cross_entropy(z.reshape(-1, 128), target)
        exact.backward()
        assert abs(loss.item() - exact.item()) < 1e-4 * (1 + step / 10), step
        for opt in steps:
            opt.step()


def test_the_model_of_peak_memory() -> None:
    """A chunk of logits, the scratch of the products, and the gradients: nothing else of size."""
    x = torch.randn(512, 64).requires_grad_()
    w = torch.randn(20000, 64).requires_grad_()
    target = torch.randint(20000, (512,))
    chunk = 4 << 20
    for way in ("hint", "buffer"):
        buffer = torch.zeros(20000, 64)
        x.grad = w.grad = None
        more: dict[str, Any] = {"accumulate_into": buffer} if way == "buffer" else {}
        with torch.profiler.profile(profile_memory=True) as profile:
            F.linear_cross_entropy(x, w, target, chunk_bytes=chunk, **more).backward()
        peak = now = 0
        for event in _allocations(profile):
            now += event
            peak = max(peak, now)
        gradients = x.nbytes + (0 if way == "buffer" else w.nbytes)
        states = 2 * 4 * 512
        scratch = torch.get_num_threads() * _C.PRODUCT_SCRATCH
        assert peak <= gradients + states + chunk + scratch + (64 << 10), (way, peak)


def _allocations(profile: Any) -> list[int]:
    """Bytes allocated and freed, in order."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
