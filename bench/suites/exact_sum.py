"""Price of the exact sum over samples, where a sample is one element: half_squared_error, fp32.

Both ways run the same kernel over the same memory (two reads, one write: the gradient, into memory
that is there already); one also adds every element's loss to a LossSum. Neither returns a loss, so
they go through ``PointwiseCall``, the step below the public functions, which sum unless a loss for
each element is asked for. Timed: the call. The second pair is public, with the losses of all
elements written as well, to fresh memory.
"""

from __future__ import annotations

import torch
from suite_settings import Settings, progress

import mbkern
from mbkern._launch_pointwise import PointwiseCall
from mbkern._launch_tensors import TensorOptions
from mbkern._losses import find
from mbkern.bench.allocator import RECYCLED
from mbkern.bench.results import Group
from mbkern.bench.timing import Way, interleave

STATES = (RECYCLED,)
SUITE = "exact-sum"
PLAIN, EXACT = "without the sum", "exact sum"
LARGE, SMALL = 1 << 24, 1 << 16
NAME = "half_squared_error"


def _kernel(size: int, threads: int, settings: Settings) -> Group:
    random = torch.Generator().manual_seed(4)
    x, t = (torch.randn(size, generator=random) for _ in range(2))
    grad = torch.empty_like(x)
    total = mbkern.LossSum()
    call = PointwiseCall(find(NAME), (x, t, None), TensorOptions(reduction="sum"))
    repeat = max(1, (1 << 20) // size)

    def run(loss_sum: torch.Tensor | None) -> None:
        for _ in range(repeat):
            call.run(
                want_loss=False, grads=(grad, None, None), loss_dtype=x.dtype, loss_sum=loss_sum
            )

    total.reset()
    run(total.state)
    exact = (x.double() - t.double()).square().sum().item() / 2 * repeat
    error = abs(total.value(dtype=torch.float64).item() - exact) / exact
    correct = bool((grad == x - t).all()) and error < 1e-6  # the terms are rounded to fp32
    ways = [
        Way(PLAIN, lambda: run(None)),
        Way(EXACT, lambda: run(total.state), lambda: _reset(total)),
    ]
    entries = interleave(ways, settings.effort(2.5), unit=1.0 / (repeat * size))
    for entry in entries:
        entry.error, entry.correct = (error if entry.name == EXACT else None), correct
    where = "from memory" if size == LARGE else "from the cache"
    case = f"{size} elements {where}, gradient only"
    return Group(SUITE, case, threads, settings.allocator, "ns/element", PLAIN, entries, 1)


def _public(size: int, threads: int, settings: Settings) -> Group:
    random = torch.Generator().manual_seed(4)
    x, t = (torch.randn(size, generator=random) for _ in range(2))
    grad, total = torch.empty_like(x), mbkern.LossSum()

    def run(loss_sum: mbkern.LossSum | None) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = mbkern.loss_and_grad(
            NAME, x, t, reduction="none", grad_out=grad, loss_sum=loss_sum
        )
        return result

    losses, _ = run(total)
    summed = total.value(dtype=torch.float64).item()
    error = abs(summed - losses.double().sum().item()) / summed
    ways = [Way(PLAIN, lambda: run(None)), Way(EXACT, lambda: run(total), lambda: _reset(total))]
    entries = interleave(ways, settings.effort(2.5), unit=1.0 / size)
    for entry in entries:
        entry.error, entry.correct = (error if entry.name == EXACT else None), error < 1e-12
    case = f"{size} elements from memory, losses and gradient"
    return Group(SUITE, case, threads, settings.allocator, "ns/element", PLAIN, entries, 1)


def _reset(total: mbkern.LossSum) -> None:
    total.reset()


def run(settings: Settings) -> list[Group]:
    """Streaming from memory and from the cache, at every number of threads."""
    groups = []
    for threads in settings.threads:
        torch.set_num_threads(threads)
        progress(NAME, threads)
        groups += [
            _kernel(LARGE, threads, settings),
            _public(LARGE, threads, settings),
            _kernel(SMALL, threads, settings),
        ]
    return groups
