"""How a loop over several processes begins and ends its process group."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def enter() -> torch.device:
    """Begin the process group that torchrun describes; return where this process computes.

    On a GPU of its own, or on the CPU where there are fewer GPUs than processes.
    """
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def leave() -> None:
    """End the process group, and let gloo's threads drop the last tensors that they reduced.

    They need Python's lock for it; where the interpreter ends first, the process aborts
    ("terminate called without an active exception", pytorch/pytorch#190489).
    """
    dist.destroy_process_group()
    time.sleep(0.2)
