"""What a setting is, the list of them, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LossFunction = Callable[..., Tensor]
Run = Callable[[LossFunction, Tensor, Tensor], Sequence[Tensor | None]]

SETTINGS: list[Setting] = []


@dataclass(frozen=True)
class Setting:
    """One way to call a loss.

    Attributes:
        name: as in the documentation.
        group: its heading there.
        run: (function, input, target) to results.
        refusal: a pattern of mbkern's error message, where the call is refused.
        exact: results have the bits of a plain call of mbkern's function.
        note: for the documentation.
        since: the oldest torch, of those tried (2.6, 2.13, 2.14), that does this.
        slow: takes seconds a call; run with the slow tests.
    """

    name: str
    group: str
    run: Run
    refusal: str = ""
    exact: bool = False
    note: str = ""
    since: str = "2.6"
    slow: bool = False


def setting(group: str, name: str, **attributes: Any) -> Callable[[Run], Run]:
    """Add the function to the list."""

    def add(run: Run) -> Run:
        SETTINGS.append(Setting(name, group, run, **attributes))
        return run

    return add


def older_torch(version: str) -> bool:
    """Whether this torch is older than ``version``."""
    have, want = (tuple(map(int, v.split(".")[:2])) for v in (torch.__version__, version))
    return have < want


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gradient(value: Tensor, x: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(value.sum(), x, **options)[0]
