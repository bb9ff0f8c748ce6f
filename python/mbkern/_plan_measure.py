"""Passes of a user's step, timed and with their peak of memory, leaving no trace."""

from __future__ import annotations

import dataclasses
import math
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbkern import _plan_memory
from mbkern._accumulator_hooks import strays_of
from mbkern._accumulator_parameters import Slot
from mbkern._micro_batches import micro_batches, renewed, tensors_in
from mbkern._plan_fit import Probe
from mbkern.bench.timing import Way, once

DRAWS = 3  # of sample(n): the largest is taken
_FIRST_S = 0.3  # what the first look at a size may take, if passes are short


class ElsewhereError(RuntimeError):
    """Another rank cannot go on."""


class Ranks:
    """What all processes agree on; one process alone agrees with itself."""

    def __init__(self) -> None:
        dist = torch.distributed
        self.several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def most(self, values: list[float]) -> list[float]:
        """The largest of each over all ranks."""
        if not self.several:
            return values
        nccl = "nccl" in torch.distributed.get_backend()
        tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if nccl else "cpu")
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def least(self, value: float) -> float:
        """The smallest over all ranks."""
        return -self.most([-value])[0]

    def together(self, measure: Callable[[], list[float]], count: int) -> list[float]:
        """The largest of what each rank measured; where one fails all do, or they would wait.

        Raises:
            Whatever ``measure`` does.
            RuntimeError: it did on another rank, and may be tried with more items there.
            ElsewhereError: it did on another rank, which has given up.
        """
        if not self.several:
            return measure()
        values, failed, raised = [0.0] * count, 0.0, None
        try:
            values = measure()
        except Exception as error:
            failed, raised = 1.0 if isinstance(error, ValueError | RuntimeError) else 2.0, error
        worst, *values = self.most([failed, *values])
        if raised is not None and failed == worst:
            raise raised
        if worst == 2:
            raise ElsewhereError("mbkern: step or sample raised on another rank") from raised
        if worst == 1:
            raise RuntimeError("mbkern: step or sample raised on another rank")
        return values

    def sharing(self) -> int:
        """How many ranks share this machine's memory."""
        if not self.several:
            return 1
        hosts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        return hosts.count(socket.gethostname())


class Source:
    """Micro-batches of any size: from a function, or from the first items of a batch."""

    def __init__(self, sample: Any) -> None:
        self._draw = sample if callable(sample) else None
        self._batch = sample
        self.most = 1 << 62 if self._draw else micro_batches(sample, 1).items
        if self.most < 1:
            raise ValueError("mbkern: the sample has no items")

    def __call__(self, items: int) -> Any:
        if self._draw is None:
            return micro_batches(self._batch, items)[0]
        drawn = [self._draw(items) for _ in range(DRAWS)]
        if any(isinstance(batch, Iterator) for batch in drawn):
            raise TypeError(
                f"mbkern: sample({items}) is a {type(drawn[0]).__name__}, which one pass uses up; "
                "give a list, or a tensor"
            )
        return max(drawn, key=size)


def size(batch: Any) -> int:
    """Bytes of the tensors and arrays of a batch."""
    return sum(t.nbytes for t in tensors_in(batch))


class Meter:
    """Measures passes. Use within ``with meter.undone():``.

    Attributes:
        device: the loss's.
        held: bytes before a pass: all that is there, and gradients.
        spent: seconds that measuring took so far; of the slowest rank.
        several: whether there are other ranks, which may not see the same errors.
    """

    def __init__(self, step: Callable[[Any], Tensor], source: Source, ranks: Ranks) -> None:
        self._step, self._source, self._ranks = step, source, ranks
        self._differentiate = True
        self._gradients: dict[Tensor, Tensor | None] = {}
        self._strays: list[tuple[Slot, bool]] = []
        self._times: dict[int, tuple[list[float], list[float]]] = {}
        self._aside = 0.0  # seconds of a pass that are ours
        self.device = torch.device("cpu")
        self.held, self.spent = 0, 0.0
        self.several = ranks.several

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Afterwards gradients and random numbers are as they were."""
        numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's
        there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = [torch.cuda.current_device()] if there else []
        with torch.random.fork_rng(devices):
            try:
                yield
            finally:
                random.setstate(numbers[0])
                np.random.set_state(numbers[1])  # noqa: NPY002
                for parameter, gradient in self._gradients.items():
                    parameter.grad = gradient
                for slot, stray in self._strays:  # an accumulator's hook has seen our backwards
                    slot.stray = stray

    def open(self, items: int) -> None:
        """Run the step for the first time, and find out where, and which gradients it has."""
        (held,) = self._ranks.together(lambda: [self._open(items)], 1)
        self.held = int(held)

    def _open(self, items: int) -> float:
        with torch.enable_grad():
            loss = self._loss(self._source(items))
            self.device = loss.device
            if self.device.type not in ("cpu", "cuda"):
                raise NotImplementedError(f"mbkern: plan measures CPU and CUDA, not {self.device}")
            self._differentiate = loss.requires_grad
            self._set_gradients_aside(loss)
            if self._differentiate:
                loss.backward()  # type: ignore[no-untyped-call]
        del loss
        _plan_memory.settle_heap()
        return float(_plan_memory.held(self.device))

    def _set_gradients_aside(self, loss: Tensor) -> None:
        """Of parameters that are seen for the first time, which may be in any pass."""
        start = time.perf_counter()
        for parameter in leaves(loss):
            if parameter not in self._gradients:
                self._gradients[parameter] = parameter.grad
                self._strays += strays_of(parameter)
                parameter.grad = None
        self._aside += time.perf_counter() - start

    def probe(self, items: int) -> Probe:
        """Measure a size: its peaks in two passes on end, its times in a few more."""
        batch: Any = None

        def look() -> list[float]:
            nonlocal batch
            batch = self._source(items)
            found = [0.0, 0.0, 0.0, self._time(self._gradient, batch)]
            found[1] = _plan_memory.peak(_repeated(self._gradient, batch), self.device) - self.held
            if self._differentiate:
                found[2] = self._time(self._function, batch)
                run = _repeated(self._function, batch)
                found[0] = _plan_memory.peak(run, self.device) - self.held
            return found

        function_bytes, gradient_bytes, warm, first = self._ranks.together(look, 4)
        self.spent += 3 * (first + warm)
        repeats = min(9, max(2, int(_FIRST_S / max(first, 1e-9))))
        none = math.nan
        probe = Probe(
            items, math.inf if self._differentiate else none, math.inf,
            max(0.0, function_bytes) if self._differentiate else none, max(0.0, gradient_bytes),
        )  # fmt: skip
        for _ in range(repeats):
            probe = self.again(probe, batch)
        return probe

    def again(self, probe: Probe, batch: Any = None) -> Probe:
        """Time a size once more; what counts is the median, since a mini-batch is typical passes.

        The shortest of several times flatters small passes: each loses its own part to others.
        """

        def look() -> list[float]:
            drawn = self._source(probe.items) if batch is None else batch
            times = [self._time(self._gradient, drawn), 0.0]
            if self._differentiate:
                times[1] = self._time(self._function, drawn)
            return times

        gradient_s, function_s = self._ranks.together(look, 2)
        self.spent += gradient_s + function_s
        gradients, functions = self._times.setdefault(probe.items, ([], []))
        gradients.append(gradient_s)
        functions.append(function_s if self._differentiate else math.nan)
        return dataclasses.replace(
            probe, function_s=statistics.median(functions), gradient_s=statistics.median(gradients)
        )

    def window(self, probe: Probe, passes: int) -> Probe:
        """Measure the peak of a size again, over more passes: the heap loses more between them."""
        if passes < 1:
            return probe

        def look() -> list[float]:
            run = _repeated(self._gradient, self._source(probe.items), passes)
            return [float(_plan_memory.peak(run, self.device) - self.held)]

        (most,) = self._ranks.together(look, 1)
        self.spent += passes * probe.gradient_s
        return dataclasses.replace(probe, gradient_bytes=max(most, probe.gradient_bytes))

    def size_of(self, items: int) -> int:
        """Bytes of a micro-batch."""
        (most,) = self._ranks.together(lambda: [float(size(self._source(items)))], 1)
        return int(most)

    def _time(self, run: Callable[[Any], None], batch: Any) -> float:
        self._aside, own = 0.0, _own(batch)
        seconds = once(Way("", lambda: run(own)), self.device.type)[0] * 1e-9
        # On a GPU the host works ahead.
        return seconds - self._aside if self.device.type == "cpu" else seconds

    def _function(self, batch: Any) -> None:
        with torch.no_grad():
            self._loss(batch)

    def _gradient(self, batch: Any) -> None:
        with torch.enable_grad():
            loss = self._loss(batch)
            if self._differentiate:
                self._set_gradients_aside(loss)
                loss.backward()  # type: ignore[no-untyped-call]

    def _loss(self, batch: Any) -> Tensor:
        loss = self._step(batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"mbkern: step must return the loss, a 0-dim tensor, not {found}")
        return loss


def _repeated(run: Callable[[Any], None], batch: Any, passes: int = 2) -> Callable[[], None]:
    def all_of_them() -> None:
        for _ in range(passes):
            run(_own(batch))

    return all_of_them


def _own(batch: Any) -> Any:
    """A batch for one pass: steps take their labels out of it."""
    try:
        return renewed(batch)
    except (TypeError, RecursionError):  # of a class that has no copies
        return batch


def leaves(loss: Tensor) -> list[Tensor]:
    """The leaves of a loss's graph that will get a gradient."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):  # a user's Function may have a variable, too
            variable: Tensor = getattr(node, "variable")  # noqa: B009 - not in torch's stubs
            found[id(variable)] = variable
        todo += [following for following, _ in node.next_functions]
    return list(found.values())
