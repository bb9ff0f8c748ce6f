"""The fused head with ``process_group=`` or a DTensor weight: what comes in, and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mbkern import _linear_buffers as buffers
from mbkern._arguments import Number
from mbkern._autograd_engine import is_legacy_batched
from mbkern._launch import scalar_argument
from mbkern._linear_agreement import LOST, PLAIN, Given, ask
from mbkern._linear_loss import (
    LinearRequest,
    _destinations,
    _save,
    _saved,
    as_argument,
)
from mbkern._linear_options import head_dtypes, linear_options
from mbkern._linear_shards import Shard, ShardCall, all_gather
from mbkern._linear_shards_exact import ExactShardCall
from mbkern._linear_stats import LinearStats
from mbkern._tensors import is_dtensor


class Enter(torch.autograd.Function):
    """``Enter.apply(tensor, group, sizes, dim, adds)``: what all ranks of a group compute with.

    Args:
        tensor: the same on all ranks; or with ``sizes`` each rank's part along ``dim``.
        sizes: of each rank's part, or None.
        adds: whether the gradient that comes back is this rank's part of a sum over ranks, which is
            then added up in float32 (float64); else it is the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, group: Any, sizes: Sequence[int] | None, dim: int, adds: bool
    ) -> Tensor:
        ctx.group, ctx.sizes, ctx.dim, ctx.adds = group, sizes, dim, adds
        if sizes is None:
            return tensor.view_as(tensor)
        most = max(sizes)
        mine = tensor.movedim(dim, 0)
        padded = mine.new_zeros((most, *mine.shape[1:]))
        padded[: mine.shape[0]] = mine
        parts = zip(all_gather(padded, group), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts]).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = grad
        if ctx.adds:
            wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
            total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
            if total.numel():
                torch.distributed.all_reduce(total, group=ctx.group)
        if ctx.sizes is not None:
            rank = torch.distributed.get_rank(ctx.group)
            part = total.narrow(ctx.dim, sum(ctx.sizes[:rank]), ctx.sizes[rank])
            total = part.clone()  # or it would keep the whole alive
        return total.to(grad.dtype), None, None, None, None


class ShardLoss(torch.autograd.Function):
    """``ShardLoss.apply(input, weight, bias, scale, target, request, shard, with_stats)``: loss,
    and with ``with_stats`` the log-sum-exp of every item and the statistics.

    Four products: the logits of this rank's classes are computed again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        target: Tensor,
        request: LinearRequest,
        shard: Shard,
        with_stats: bool,
    ) -> Any:
        call = _call((input, weight, bias, scale, target), request, shard)
        divisor = ctx.divisor = call.divisor()
        items, stats = call.exchange(with_stats)
        loss = call.loss(items, divisor, request.loss_dtype)
        _save(ctx, (input, weight, bias, scale, target), items.saved(), request)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        if stats is None:
            return loss
        found = _of_all_items(call, stats)
        plain = found[:-1]
        ctx.mark_non_differentiable(*plain)
        return (loss, found.lse, *plain)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, *more: Tensor | None) -> Any:
        of_lse = more[0] if more else None
        if torch.is_grad_enabled() or any(
            g is not None and is_legacy_batched(g) for g in (incoming, of_lse)
        ):
            raise RuntimeError(
                "mbkern: linear_cross_entropy over several processes gives no gradient that can "
                "itself be differentiated (create_graph=True), or taken for many incoming "
                "gradients at once"
            )
        tensors, saved, request = _saved(ctx)
        input, bias, scale = tensors[0], tensors[2], tensors[3]
        call = _call(tensors, request, ctx.shard)
        into, sums = _destinations(ctx, call, tensors, request)
        factor = item_scale = None
        divisor = ctx.divisor
        if incoming is not None and request.options.row.reduction == "none":
            item_scale, divisor = call.of_kept(incoming), 1.0
        elif incoming is not None:
            factor = scalar_argument(incoming, "the incoming gradient")
        if of_lse is not None:
            of_lse = call.of_kept(of_lse).reshape(-1)
        call.gradients(into, saved, divisor, factor, item_scale, of_lse)
        into.weight = None
        grad_weight = sums.finish() if sums is not None else None
        return (
            as_argument(into.input, input), grad_weight, as_argument(into.bias, bias),
            as_argument(into.scale, scale), *(None,) * 4,
        )  # fmt: skip


def _call(tensors: tuple[Any, ...], request: LinearRequest, shard: Shard) -> ShardCall:
    input, weight, bias, scale, target = tensors
    kind = ExactShardCall if request.options.split_invariant else ShardCall
    return kind(input, weight, bias, target, scale, request.options, request.dtype, shard=shard)


def _of_all_items(call: ShardCall, stats: LinearStats) -> LinearStats:
    """Statistics in the shape of the unreduced loss, of rows that were not computed, too."""

    def spread(values: Tensor, fill: int = 0) -> Tensor:
        values = values.view(-1, call.items)
        if call.kept is not None:
            whole = values.new_full((call.loss_rows, call.items), fill)
            values = whole.index_copy_(0, call.kept, values)
        return values.reshape(call.shape)

    return LinearStats(
        stats.items, stats.accuracy, spread(stats.predictions, -1), spread(stats.log_prob),
        spread(stats.entropy), spread(stats.lse),
    )  # fmt: skip


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    *,
    process_group: Any,
    accumulate_into: Tensor | str | None,
    return_stats: bool,
    loss_dtype: torch.dtype | None,
    logit_scale: Number | None,
    split_invariant: bool,
    **options: Any,
) -> Any:
    """See :func:`mbkern.functional.linear_cross_entropy`."""
    tensors = [input, linear_weight, target, linear_bias, logit_scale, accumulate_into]
    group, sizes, dim = process_group, None, 0
    shard: Shard | None = None
    plain = True
    _require_no_tracer(*tensors)
    if any(is_dtensor(t) for t in (*tensors, *options.values())):
        local = _Local(linear_weight, group)
        group, shard, plain = local.group, local.shard, not is_dtensor(input)
        input, sizes, dim = local.input(input)
        target, logit_scale = local.whole(target), local.whole(logit_scale)
        linear_bias = local.part(linear_bias, "linear_bias")
        accumulate_into = local.part(accumulate_into, "accumulate_into")
        linear_weight = local.part(linear_weight, "linear_weight")
        options = {name: local.whole(value) for name, value in options.items()}
    input, target = _waited_for(input), _waited_for(target)
    if shard is None or plain:
        given = Given(
            input, linear_weight, target, linear_bias, logit_scale, accumulate_into, return_stats,
            {"split_invariant": split_invariant, "loss_dtype": loss_dtype, **options},
        )  # fmt: skip
        found = ask(given, group)
        sizes, shard = found.rows, shard or found.shard
        # Or the others' backward waits for this rank.
        input = _recorded(input, found.input_is_differentiated)
        logit_scale = _recorded(logit_scale, found.scale_is_differentiated)
    scale = logit_scale if isinstance(logit_scale, Tensor) else None
    inputs = (input, linear_weight, linear_bias, scale, target)
    if any(type(t) not in (*PLAIN, type(None)) for t in inputs):
        kinds = [type(t).__name__ for t in inputs]
        raise TypeError(
            f"mbkern: over several processes tensors must be plain or DTensors, not {kinds}"
        )
    if target.is_floating_point():
        raise NotImplementedError(
            "mbkern: over several processes the target must be class indices, not probabilities"
        )
    joined = Enter.apply(input, group, sizes, dim, not split_invariant)  # type: ignore[no-untyped-call]
    head = linear_options(
        joined, linear_weight, target, linear_bias, logit_scale=logit_scale,
        classes=shard.total,
        split_invariant=split_invariant, **options,
    )  # fmt: skip
    if scale is not None:
        scale = Enter.apply(scale, group, None, 0, True)  # type: ignore[no-untyped-call]
    dtype, loss_dtype = head_dtypes(joined, linear_weight, target, loss_dtype)
    has_graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (joined, linear_weight, linear_bias, scale)
    )
    if accumulate_into is not None:
        others = (joined, linear_bias, target, scale, head.row.weight, head.row.sample_weight)
        buffers.check(accumulate_into, linear_weight, others)
        if has_graph and not linear_weight.requires_grad:
            raise ValueError(LOST)
    request = LinearRequest(head, dtype, loss_dtype, None, accumulate_into)
    found = ShardLoss.apply(  # type: ignore[no-untyped-call]
        joined, linear_weight, linear_bias, scale, target, request, shard, return_stats
    )
    if not return_stats:
        return found
    loss, lse, count, accuracy, predictions, log_prob, entropy = found
    return loss, LinearStats(count, accuracy, predictions, log_prob, entropy, lse)


def _require_no_tracer(*tensors: Any) -> None:
    """Raise under what sees no kernels and no collectives. Function modes see them as they are."""
    first = next((t for t in tensors if isinstance(t, Tensor)), None)
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or (first is not None and first.is_meta)
    ):
        raise RuntimeError(
            "mbkern: linear_cross_entropy over several processes cannot be traced: not under "
            "torch.compile and torch.func, in dispatch modes, in forward mode, on meta tensors"
        )


def _recorded(value: Any, differentiated: bool) -> Any:
    """A tensor that requires grad if it does on another rank."""
    if differentiated and isinstance(value, Tensor) and not value.requires_grad:
        return value.detach().requires_grad_()
    return value


def _waited_for(tensor: Tensor) -> Tensor:
    """A tensor that a collective may still be writing, as a plain one."""
    if type(tensor).__name__ == "AsyncCollectiveTensor":
        return tensor.clone()
    return tensor


class _Local:
    """The parts of DTensors that are here, of a weight with its classes over one mesh dimension."""

    def __init__(self, weight: Any, group: Any) -> None:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Cut

        if not is_dtensor(weight):
            raise TypeError(
                "mbkern: linear_weight is a plain tensor, and another argument a DTensor; over "
                "several processes the weight must be one, too"
            )
        self.mesh, self.placements = weight.device_mesh, tuple(weight.placements)
        cuts = [k for k, p in enumerate(self.placements) if p == Cut(0)]
        others = [p for k, p in enumerate(self.placements) if k not in cuts]
        if len(cuts) != 1 or any(p != Replicate() for p in others):
            raise NotImplementedError(
                f"mbkern: linear_weight is placed {self.placements}; it must be Shard(0), its "
                "classes cut, over one mesh dimension and replicated over the others"
            )
        self.at = cuts[0]
        self.group = self.mesh.get_group(self.at)
        self.given = group
        ranks = torch.distributed.get_process_group_ranks
        if group is not None and ranks(group) != ranks(self.group):
            raise ValueError(
                f"mbkern: linear_weight is cut over ranks {ranks(self.group)}, and process_group "
                f"has {ranks(group)}"
            )
        classes, world = weight.shape[0], self.mesh.size(self.at)
        self.world = world
        self.shard = Shard(self.group, _chunks(classes, world))
        here = weight.to_local().shape[0]
        if here != self.shard.sizes[self.mesh.get_local_rank(self.at)]:
            raise ValueError(
                f"mbkern: this rank has {here} of the {classes} classes of linear_weight; a "
                f"DTensor that is cut otherwise than into {self.shard.sizes} is not supported"
            )

    def input(self, input: Any) -> tuple[Tensor, tuple[int, ...] | None, int]:
        """The input that is here, the sizes of its parts (None: it is all here), and their dim."""
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Cut

        if not is_dtensor(input):
            if self.given is None:
                raise TypeError(
                    "mbkern: linear_weight is a DTensor, and the input a plain tensor, which does "
                    "not say whether all ranks have the same: pass a DTensor, or process_group= if "
                    "they do"
                )
            if self.mesh.ndim > 1:
                raise TypeError(
                    "mbkern: linear_weight lies on a mesh of several dimensions; a plain input "
                    "does not say over which of them it is the same: pass a DTensor"
                )
            return input, None, 0
        if input.device_mesh != self.mesh:
            raise ValueError("mbkern: input and linear_weight are on different meshes")
        wanted: list[Any] = [Replicate()] * len(self.placements)
        placement = input.placements[self.at]
        sizes, dim = None, 0
        # Not a subclass, which cuts otherwise; and not along the features.
        if type(placement) is Cut and placement.dim % input.dim() < input.dim() - 1:
            dim = placement.dim % input.dim()
            wanted[self.at] = Cut(dim)
            sizes = _chunks(input.shape[dim], self.world)
        if tuple(input.placements) != tuple(wanted):
            input = input.redistribute(self.mesh, wanted)
        return input.to_local(grad_placements=wanted), sizes, dim

    def part(self, value: Any, name: str) -> Any:
        """This rank's part of what is cut as the weight is."""
        if isinstance(value, str):
            raise ValueError(
                f"mbkern: {name}={value!r} goes with a plain weight; of a DTensor, pass the buffer"
            )
        if not is_dtensor(value):
            return value
        if tuple(value.placements) != self.placements:
            if name == "accumulate_into":
                raise ValueError(f"mbkern: {name} is placed {tuple(value.placements)}, and the "
                                 f"weight {self.placements}")  # fmt: skip
            value = value.redistribute(self.mesh, self.placements)
        return value.to_local(grad_placements=self.placements)

    def whole(self, value: Any) -> Any:
        """What all ranks have."""
        from torch.distributed.tensor import Replicate

        if not is_dtensor(value):
            return value
        every = [Replicate()] * value.device_mesh.ndim
        return value.redistribute(value.device_mesh, every).to_local(grad_placements=every)


def _chunks(size: int, world: int) -> tuple[int, ...]:
    """How DTensor cuts a dimension."""
    step = -(-size // world)
    return tuple(max(0, min(step, size - rank * step)) for rank in range(world))
