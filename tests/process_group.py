"""How a script of several processes ends its process group."""

from __future__ import annotations

import time

import torch.distributed as dist


def leave() -> None:
    """End the process group, and let gloo's threads drop the last tensors that they reduced.

    They need Python's lock for it; where the interpreter ends first, the process aborts
    ("terminate called without an active exception", pytorch/pytorch#190489).
    """
    dist.destroy_process_group()
    time.sleep(0.2)
