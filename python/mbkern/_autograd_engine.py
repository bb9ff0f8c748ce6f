"""What torch's autograd tells of a backward, where it has public names for none of it."""

from __future__ import annotations

import torch
from torch import Tensor

SECOND_BACKWARD = (
    "mbkern: trying to backward through the graph a second time, but the gradient formed in "
    "forward has been handed out. Specify retain_graph=True in the first backward."
)

is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
# Those around the call, or None.
saved_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
# Saved first under hooks. A checkpoint compares what is saved again by shapes only, and torch's
# function, if `patched()` has been left since, may save the same shapes in another order.
MARK = torch.zeros((1,) * 7, dtype=torch.int8, device="cpu")
_storage_users = getattr(torch._C, "_storage_Use_Count", lambda _: 0)
_OURS = 2  # a tensor, and its storage as an object


def is_ours_alone(tensor: Tensor) -> bool:
    """Whether nobody else holds the memory of a tensor that hooks returned: another node that does
    would not see that it was written to, since there no versions are compared."""
    return bool(_storage_users(tensor.untyped_storage()._cdata) == _OURS)
