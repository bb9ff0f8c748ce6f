"""What the ranks of a head over a cut vocabulary tell each other before they compute.

What must be the same is, or all of them raise; so they do where one refuses its own arguments: the
others would wait for it in the next collective.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbkern import _linear_buffers as buffers
from mbkern._linear_shards import Shard, all_gather
from mbkern._tensors import describe

PLAIN = (Tensor, torch.nn.Parameter)


class Given(NamedTuple):
    """The arguments of a call that are this rank's own or may differ."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    scale: Any
    accumulate_into: Any
    return_stats: bool
    options: Mapping[str, Any]


class Found(NamedTuple):
    """What the ranks have: classes; rows of their parts of the input (None: all of it each);
    whether the input, or the tensor of the scale, requires grad on any rank."""

    shard: Shard
    rows: tuple[int, ...] | None
    input_is_differentiated: bool
    scale_is_differentiated: bool


class _Own(NamedTuple):
    """What one rank tells, in numbers."""

    refused: int
    classes: int = 0
    rows: int = 0
    records: int = 0
    input_grad: int = 0
    scale_grad: int = 0
    weight_is_lost: int = 0


_SAME = (
    "shapes of the input, but for its first dimension", "shapes or kinds of the target",
    "dtypes of the input", "shapes of linear_weight, but for the classes",
    "dtypes of linear_weight", "linear_bias, of the shape of the weight or None",
    "kinds of logit_scale", "return_stats", "options", "targets",
)  # fmt: skip


def ask(given: Given, group: Any) -> Found:
    """Tell the ranks what this one has, and learn what they have."""
    if torch.distributed.get_rank(group) < 0:
        raise ValueError("mbkern: this rank is not of the process_group given")
    refused: Exception | None = None
    own, same = _Own(1), [0] * len(_SAME)
    try:
        _check(given)
        own, same = _tell(given), _same(given)
    except Exception as error:
        refused = error
    tensors = [t for t in given if isinstance(t, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    mine = torch.tensor([*own, *same], device=device)
    if refused is None:
        flat = given.target.detach().reshape(-1).long()
        places = torch.arange(1, flat.numel() + 1, device=device)
        mine[-1] = (flat * places).sum()
    table = all_gather(mine, group).tolist()
    if refused is not None:
        raise refused
    ranks = [_Own(*row[: len(own)]) for row in table]
    if any(rank.refused for rank in ranks):
        raise ValueError("mbkern: another rank has refused its arguments, and says why")
    columns = list(zip(*table, strict=True))[len(own) :]
    for name, values in zip(_SAME, columns, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"mbkern: the {name} differ between ranks; here the input is "
                f"{describe(given.input)}, the target {describe(given.target)}, the weight "
                f"{describe(given.weight)}, return_stats {given.return_stats}, the options "
                f"{_options(given)}; the target is of all rows on every rank"
            )
    return _found(given, group, ranks)


def _found(given: Given, group: Any, ranks: list[_Own]) -> Found:
    input_grad = any(rank.input_grad for rank in ranks)
    scale_grad = any(rank.scale_grad for rank in ranks)
    if (input_grad or scale_grad) and not all(rank.records for rank in ranks):
        raise ValueError(
            "mbkern: gradients are recorded on some ranks and not on others (torch.no_grad), which "
            "would be missed in backward"
        )
    if (input_grad or scale_grad) and any(rank.weight_is_lost for rank in ranks):
        raise ValueError(LOST)
    shard = Shard(group, tuple(rank.classes for rank in ranks))
    sizes = tuple(rank.rows for rank in ranks)
    batched = given.input.dim() > 1 and given.target.dim() > 0
    wanted = given.target.shape[0] if batched else 1
    if all(size == wanted for size in sizes):
        return Found(shard, None, input_grad, scale_grad)
    if sum(sizes) != wanted:
        raise ValueError(
            f"mbkern: the ranks' inputs have {', '.join(map(str, sizes))} rows; the target, which "
            f"has {wanted}, goes with as many on every rank, or with as many on all of them"
        )
    return Found(shard, sizes, input_grad, scale_grad)


LOST = (
    "mbkern: accumulate_into is given, and linear_weight does not require grad: nothing would be "
    "added"
)


def _check(given: Given) -> None:
    """Raise for what is wrong with this rank's own tensors."""
    named = {
        "input": given.input, "linear_weight": given.weight, "target": given.target,
        "linear_bias": given.bias,
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is None and name == "linear_bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"mbkern: {name} must be a tensor, not {type(tensor).__name__}")
        if type(tensor) not in PLAIN:
            raise TypeError(
                "mbkern: over several processes tensors must be plain or DTensors, and "
                f"{name} is a {type(tensor).__name__}"
            )
        if tensor.device != given.input.device:
            raise ValueError(
                f"mbkern: {name} is on {tensor.device}, and input on {given.input.device}"
            )
    if given.weight.dim() < 2:
        raise ValueError(
            "mbkern: linear_weight must be (C, in_features) or (C, d1, ..., in_features), not "
            f"{tuple(given.weight.shape)}"
        )
    if given.accumulate_into is not None:
        others = (given.input, given.bias, given.target, _tensor(given.scale))
        weights = (given.options.get(name) for name in ("weight", "sample_weight"))
        buffers.check(given.accumulate_into, given.weight, (*others, *map(_tensor, weights)))
    of_bias = given.bias is not None and given.bias.requires_grad
    if of_bias and torch.is_grad_enabled() and _weight_is_lost(given):
        raise ValueError(LOST)


def _weight_is_lost(given: Given) -> bool:
    return given.accumulate_into is not None and not given.weight.requires_grad


def _tell(given: Given) -> _Own:
    records = torch.is_grad_enabled()
    scale = _tensor(given.scale)
    return _Own(
        0,
        given.weight.shape[0],
        given.input.shape[0] if given.input.dim() > 1 else 1,
        records,
        records and given.input.requires_grad,
        records and scale is not None and scale.requires_grad,
        _weight_is_lost(given),
    )


def _same(given: Given) -> list[int]:
    """Numbers that are the same on all ranks if what ``_SAME`` names is; the last is not known."""
    bias, weight, target = given.bias, given.weight, given.target
    fits = bias is None or (bias.shape == weight.shape[:-1], bias.is_floating_point())
    return [
        _number(value)
        for value in (
            tuple(given.input.shape[1:]), (tuple(target.shape), target.is_floating_point()),
            given.input.dtype,
            tuple(weight.shape[1:]), weight.dtype, (bias is None, fits), _kind(given.scale),
            bool(given.return_stats), _options(given), None,
        )
    ]  # fmt: skip


def _options(given: Given) -> dict[str, Any]:
    """What the options say, comparable; a chunk's size is each rank's own but where sums are in
    order."""
    found = {name: _kind(value) for name, value in given.options.items()}
    if not given.options.get("split_invariant"):
        found = {k: v for k, v in found.items() if k not in ("chunk_bytes", "options")}
    return {name: value for name, value in found.items() if value is not None}


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if hasattr(value, "batch_chunk_size"):
        return value.batch_chunk_size
    try:
        return value if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return value


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _number(value: object) -> int:
    """The same number on every rank for the same value."""
    return zlib.crc32(repr(value).encode())
