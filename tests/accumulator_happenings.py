"""What happens to a window of GradAccumulator, by chance, and to its model likewise."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from accumulator_model import UNIT, WIDE
from accumulator_world import World
from torch import Tensor, nn

from mbkern import _accumulator_collect
from mbkern import functional as F


@contextmanager
def buckets_of(size: int) -> Iterator[None]:
    """With 1, every gradient is added as soon as it is there."""
    before = _accumulator_collect.BUCKET_BYTES
    _accumulator_collect.BUCKET_BYTES = size
    try:
        yield
    finally:
        _accumulator_collect.BUCKET_BYTES = before


class Happenings(World):
    """Each is a method; which of them, and with what, is the generator's choice."""

    def begin(self) -> None:
        """In known mode, what the window will be divided by, whatever will be counted."""
        if self.mode == "known" and not self.model.totals:
            totals = {name: self.rng.choice([3.0, 7.0, 0.3]) for name in self.options.names}
            self.model.totals = totals
            given = {n: torch.tensor(t, dtype=WIDE) if self.rng.random() < 0.5 else t
                     for n, t in totals.items()}  # fmt: skip
            self.acc.begin(given if self.options.names != ("",) else given[""])
            for total in given.values():
                if isinstance(total, Tensor):
                    total.fill_(99.0)  # it was read

    def micro_batch(self) -> None:
        self.open_window()
        grads = self.gradients()
        if not grads:
            return
        self.clear()
        denominator = self.rng.choice(self.options.names)
        count, n = self.count()
        several = [grads]
        kernel: dict[str, Tensor] = {}
        plain = self.options.given["pre_scale"] == 1
        if plain and self.rng.random() < 0.5:
            if self.rng.random() < 0.2:
                several.append(self.gradients())
            if self.options.kernels and self.scaler is None and self.rng.random() < 0.4:
                name = self.rng.choice(list(grads))
                kernel[name] = several[0].pop(name)
                if self.rng.random() < 0.8:  # else autograd may bring one of it, too
                    several = [{k: g for k, g in one.items() if k != name} for one in several]
            several = [one for one in several if one]
            with buckets_of(self.bucket), self.acc.micro_batch(count, denominator):
                for name, g in kernel.items():
                    self.by_kernel(name, g, denominator)
                for one in several:
                    self.loss(one).backward()
        else:
            with buckets_of(self.bucket):
                self.acc.backward(self.loss(grads), count, denominator)
        self.taken(several, denominator, n, kernel)
        if self.mode == "streaming":
            self.compare(keep=True)

    def by_kernel(self, name: str, g: Tensor, denominator: str) -> None:
        alpha = 1 / self.model.totals[denominator] if self.mode == "known" else 1.0
        self.acc.buffer(self.parameters()[name], denominator).add_(g.to(WIDE) * alpha)

    def head_batch(self) -> None:
        """The fused head adds to the buffer itself."""
        w = self.parameters().get(self.head)
        if w is None or not w.requires_grad or not self.options.kernels or self.scaler:
            return
        if self.mode == "known":  # nobody divides the loss: see GradAccumulator.buffer
            return
        self.clear()
        denominator = self.rng.choice(self.options.names)
        x, target = self.normal((6, 3)), torch.arange(6)
        with self.acc.micro_batch(6, denominator):
            F.linear_cross_entropy(
                x, w, target, reduction="sum",
                accumulate_into=self.acc.buffer(w, denominator),
            ).backward()  # fmt: skip
        wide = w.detach().to(WIDE).requires_grad_()
        loss = nn.functional.cross_entropy(x.to(WIDE) @ wide.t(), target, reduction="sum")
        (g,) = torch.autograd.grad(loss, wide)
        one = self.model.of[self.head]
        self.taken([], denominator, 6, {self.head: g})
        # The head's own error, of fp32 products: some units of the largest element.
        k = self.model.which(denominator)
        one.sizes[k] = one.sizes[k] + 20 * g.abs().max() * (2**-24 / UNIT[self.options.kind])
        if self.mode == "streaming":
            self.compare(keep=True)

    def stray(self) -> None:
        """A kernel adds between two micro-batches: nothing is counted, nor measured."""
        if not self.options.kernels or self.scaler is not None:
            return
        self.begin()
        denominator = self.rng.choice(self.options.names)
        name = self.rng.choice(list(self.parameters()))
        p, model = self.parameters()[name], self.model
        if not p.requires_grad:
            return
        self.clear()
        g = self.normal(tuple(p.shape), p.dtype)
        self.by_kernel(name, g, denominator)
        alpha = 1 / model.totals[denominator] if model.known else 1.0
        model.of[name].add(model.which(denominator), g, alpha)
        model.measured = False

    def fail(self, grads: dict[str, Tensor]) -> None:
        """A micro-batch of 3 items that fails after its backward."""
        with suppress(KeyError), self.acc.micro_batch(torch.tensor(3), self.options.names[0]):
            self.loss(grads).backward()
            raise KeyError

    def fail_early(self) -> None:
        """Nothing was added: the window is as it was."""
        if self.options.given["pre_scale"] != 1:
            return
        self.open_window()
        grads = self.gradients()
        if not grads:
            return
        self.clear()
        self.fail(grads)
        if self.mode != "streaming":  # there they should be those of before: a test of its own
            assert all(p.grad is None for p in self.parameters().values())

    def fail_late(self) -> None:
        """Something was added: the window is refused until somebody decides."""
        if self.options.given["pre_scale"] != 1:
            return
        self.open_window()
        # One without elements would wait in the bucket, and be dropped.
        grads = {name: g for name, g in self.gradients().items() if g.numel()}
        if not grads:
            return
        self.clear()
        with buckets_of(1):
            self.fail(grads)
        for refused in (self.acc.flush, self.acc.state_dict):
            with pytest.raises(RuntimeError, match=r"failed .*reset\(\) drops the window"):
                refused()
        if self.rng.random() < 0.5:
            self.acc.reset()
            self.model.forget()
            self.scaler, self.scale = None, 1.0
            return
        self.acc.keep_partial()
        self.taken([grads], self.options.names[0], 3, {})
        self.model.measured = False

    def open_window(self) -> None:
        self.begin()
        if not self.model.received() and self.scaler is None and self.rng.random() < 0.25:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
            self.scale = 2.0**10

    def clear(self) -> None:
        """Others' zero_grad, of either kind, or none at all."""
        kind = self.rng.randrange(3)
        if kind and self.mode != "streaming":
            torch.optim.SGD(self.module.parameters(), lr=0.0).zero_grad(set_to_none=kind == 1)

    def drop(self) -> None:
        self.acc.reset()
        self.model.forget()
        self.scaler, self.scale = None, 1.0

    def freeze(self) -> None:
        """Or the other way: what was added stays."""
        p = self.rng.choice(list(self.parameters().values()))
        p.requires_grad_(not p.requires_grad)

    def grow(self) -> None:
        name = self.new_parameter()
        self.acc.add(self.module if self.options.as_module else [(name, self.parameters()[name])])
        self.know_all()

    def replace(self) -> None:
        if not self.options.as_module or self.model.micro_batches or self.model.received():
            return
        name = self.rng.choice(list(self.parameters()))
        old = self.parameters()[name]
        setattr(self.module, name, nn.Parameter(old.detach().clone()))
        self.acc.add(self.module)
        self.know_all()
        assert old.grad is None

    def remove(self) -> None:
        if not self.options.as_module or self.model.received() or len(self.parameters()) < 3:
            return
        name = self.rng.choice(list(self.parameters()))
        delattr(self.module, name)
        del self.model.of[name]
        self.removed = True

    def resume(self) -> None:
        """Save, and go on in a fresh accumulator of fresh parameters."""
        # A parameter that is gone is still known by name; which group one that came later belongs
        # to, a fresh accumulator cannot know.
        late = not self.options.as_module and len(self.parameters()) != self.first
        if self.removed or late:
            return
        state = self.acc.state_dict()
        self.module = copy.deepcopy(self.module)
        self.acc = self.accumulator()
        self.acc.load_state_dict(state)
        self.know_all()

    def twin(self) -> None:
        """Go on with a copy; the original does something else, of which it sees nothing."""
        old, old_module = self.acc, self.module
        self.module, self.acc = copy.deepcopy((self.module, self.acc))
        self.know_all()
        old.reset()
        for p in old_module.parameters():
            p.requires_grad_(False)
            p.grad = None

    def flush(self) -> None:
        overflow = False
        if self.scaler is not None and self.model.micro_batches and self.rng.random() < 0.3:
            one = self.gradients()
            name = next((n for n, g in one.items() if g.numel()), None)
            if name is not None:
                one[name].view(-1)[0] = math.inf
                self.acc.backward(self.loss(one), torch.tensor(1), self.options.names[0])
                self.taken([one], self.options.names[0], 1, {})
                overflow = True
        self.compare(keep=False, overflow=overflow)
        self.model.forget()
        self.scaler, self.scale = None, 1.0
        if self.rng.random() < 0.2:  # and an empty one
            self.compare(keep=False)
        self.acc.max_norm = self.given["max_norm"] = self.rng.choice([self.given["max_norm"], 0.5])


HAPPENINGS = {
    "micro_batch": 10, "flush": 4, "head_batch": 2, "stray": 0.5, "fail_early": 1, "fail_late": 1,
    "drop": 0.5, "freeze": 1, "grow": 0.5, "replace": 0.5, "remove": 0.3, "resume": 1, "twin": 1,
}  # fmt: skip


def play(seed: int, steps: int = 30, **settings: Any) -> Happenings:
    """A random sequence of happenings, and a flush at its end."""
    world = Happenings(seed, **settings)
    done: list[str] = []
    try:
        for _ in range(steps):
            (name,) = world.rng.choices(list(HAPPENINGS), list(HAPPENINGS.values()))
            done.append(name)
            getattr(world, name)()
        done.append("last flush")
        world.flush()
    except Exception as error:
        raise AssertionError(f"seed {seed}, {world.options}: {', '.join(done)}") from error
    return world
