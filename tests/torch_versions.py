"""What older versions of torch lack that some tests need."""

from __future__ import annotations

import pytest
import torch

#: Some do not say whether there are hooks of saved tensors around a call.
tells_of_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="NOT CHECKED: this torch does not tell of hooks",
)
#: FSDP2 of torch 2.6 asks CPU streams for events, which they have not.
shards_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"),
    reason="NOT CHECKED: FSDP2 of this torch does not run on the CPU",
)
