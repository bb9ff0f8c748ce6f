"""The fused head: linear, then cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mbkern import _linear_buffers as buffers
from mbkern import _linear_parallel as parallel
from mbkern import _traced
from mbkern._arguments import Number, compute_dtype, hint_value
from mbkern._linear_call import Gradients, LinearCall
from mbkern._linear_loss import LinearLoss, LinearRequest, LogSumExp, unfused
from mbkern._linear_ops import linear_loss
from mbkern._linear_options import check_flag, head_dtypes, linear_options
from mbkern._linear_rows import LinearOptions, per_item
from mbkern._linear_stats import Collector, LinearStats, capped, gather, of_logits
from mbkern._tensors import is_differentiated, is_dtensor, require_one_device
from mbkern.functional._cross_entropy import cross_entropy
from mbkern.functional._ends import _refuse_other_gradients


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: Number | None = None,
    denominator: Number | None = None,
    shift: bool | int = False,
    grad_scale: Number | None = None,
    accumulate_into: Tensor | str | None = None,
    split_invariant: bool = False,
    chunk_bytes: int | None = None,
    sample_weight: Tensor | None = None,
    num_valid: int | None = None,
    filter_eps: float | str | None = None,
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    process_group: Any = None,
) -> Any:
    """Cross-entropy of ``linear(input, linear_weight, linear_bias)``, without the logits.

    A superset of :func:`torch.nn.functional.linear_cross_entropy`. A chunk of logits is computed at
    a time, its gradient formed over it and multiplied on; gradients of weight and bias are added up
    in float32 (float64), whatever the operands are.

    Args:
        input: (*, in_features) of any number of leading dimensions.
        linear_weight: (C, in_features), or (C, d1, ..., in_features) for a loss of each of d1, ...
        target: class indices of any integer dtype, (*) or (*, d1, ...); or class probabilities,
            (*, C) or (*, C, d1, ...).
        linear_bias: (C) or (C, d1, ...).
        weight: one weight a class, (C).
        reduction: "none", "mean" or "sum", as in :func:`mbkern.functional.cross_entropy`.
        ignore_index: items with this class index count nothing; their rows are not computed on the
            CPU. None is -100; it goes with class indices only.
        label_smoothing, z_loss, softcap, denominator, sample_weight, loss_dtype: as in
            :func:`mbkern.functional.cross_entropy`. The cap comes after ``logit_scale``.
        options: torch's ``LinearCrossEntropyOptions``: its ``batch_chunk_size`` is taken as the
            rows of a chunk; the rest has no counterpart here: a second backward and sums in
            float32 need no option.
        logit_scale: finite number or 0-dim tensor that multiplies the logits, bias included; a
            tensor that requires grad gets its gradient.
        shift: predict the target this many places on along the last leading dimension (True: 1),
            without a copy of it: item t is compared with ``target[..., t + shift]``. The loss has
            that many items less.
        grad_scale: a hint of the incoming gradient, GradScaler's scale for instance: 16-bit
            gradients are then formed in forward, multiplied by it in float32.
        accumulate_into: where the weight's gradient is added in backward, in place: a tensor of the
            weight's shape (float32; others by way of a float32 temporary), "grad" for the weight's
            own ``.grad``, or "main_grad" (Megatron-LM). Autograd returns none then: a hook that
            was registered on the weight gets None; post-accumulate hooks run. Nothing is added in
            a backward that does not go on to the weight (``inputs=``). What is added is this
            rank's own: DistributedDataParallel reduces ``.grad`` only, in the weight's dtype; a
            tensor or ``main_grad`` is the caller's to reduce.
        split_invariant: the gradients of weight and bias are the same bits for every cut of the
            mini-batch, thread count, instruction set and on CUDA, given ``accumulate_into`` or
            ``loss_and_grad(..., accumulate=True)`` and buffers of float32 (float64 where all is
            computed in it); otherwise that holds for one call only, since micro-batches are added
            up rounded. Logits, too, are float32 then.
        chunk_bytes: memory of a chunk of logits; None: 64 MiB on the CPU.
        num_valid: how many rows have a target that is not ignored, if that is known: on CUDA, rows
            are left out only then, since nobody may wait for the device to count them; else they
            are computed and count nothing. Another number raises on the CPU, but under transforms,
            which do not look at it. On CUDA nobody can: a larger one costs time only; a smaller one
            silently leaves out rows that count, the last ones.
        filter_eps: leave out of the products what is small (CPU): blocks of gradients of logits,
            12 classes (6 on AVX2) of a chunk or 12 rows of 256 classes, in which every softmax is
            below it (times the largest weight). The error of an element of the input's gradient is
            at most ``filter_eps`` times the sum of the magnitudes of its weights, and so for the
            weight's; "auto" is 1/32 of the resolution of the input's dtype (2^-12 for bfloat16).
            Not with ``split_invariant``; no effect under tracers.
        return_stats: return ``(loss, stats)``, a :class:`mbkern.LinearStats`: number of items,
            accuracy, predictions, and of every item the log-probability of its target, entropy and
            log-sum-exp, which can be differentiated. Looks at the logits as they pass, at the cost
            of about five passes over them.
        process_group: the classes are cut over these processes, in the order of their ranks, in
            parts of any size: ``linear_weight`` and ``linear_bias`` are this rank's; target,
            ``weight`` (of all classes) and the rest are the same on all ranks. The input is the
            same on all ranks, or each rank's part of its first dimension (sequence-parallel); its
            gradient comes back as the input came, a sum over ranks in float32. A ``linear_weight``
            that is a DTensor with Shard(0) says all this by itself, if the input is one, too. Class
            indices only; four products; no tracers. One all-gather of three numbers an item in
            forward, one all-reduce of the input's gradient; the sizes of the parts are asked for in
            every call, which waits for the device: DTensors know them. With ``split_invariant`` the
            bits are those of one process (with ``accumulate_into``, or an incoming gradient of 1)
            where every rank's classes begin at a multiple of 1024; not with ``label_smoothing``,
            ``weight``, ``return_stats`` or a tensor as ``logit_scale``. The ranks' parts of the
            input's gradient are then added up one after the other, the sums of 1024 logits each
            are exchanged, and memory is that of three chunks.

    Returns:
        The loss: 0-dim, or one an item; with ``return_stats`` a pair.

    Cost, in matrix products of the head's size: three where gradients are formed in forward
    (float32, float64, or ``grad_scale`` given); four, the logits computed once more in backward,
    with ``accumulate_into``, ``reduction="none"``, or 16-bit operands without ``grad_scale``.
    Memory: a chunk of logits, 1.2 MB a thread, the gradients; for a 16-bit weight without
    ``accumulate_into`` a float32 copy of its gradient besides.

    Under torch.compile, in dispatch and function modes and with fake tensors four products, chunk
    by chunk. Under torch.func and export, for tensor subclasses, where class probabilities require
    grad, and for statistics in any of these, the formula runs unfused, all logits at once.
    """
    if process_group is not None or is_dtensor(linear_weight):
        _refuse_other_gradients(weight, sample_weight, denominator)
        return parallel.linear_cross_entropy(
            input, linear_weight, target, linear_bias, process_group=process_group,
            accumulate_into=accumulate_into, return_stats=return_stats, loss_dtype=loss_dtype,
            logit_scale=logit_scale, split_invariant=split_invariant, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
            options=options, z_loss=z_loss, softcap=softcap, denominator=denominator, shift=shift,
            chunk_bytes=chunk_bytes, sample_weight=sample_weight, num_valid=num_valid,
            filter_eps=filter_eps,
        )  # fmt: skip
    head = linear_options(
        input, linear_weight, target, linear_bias, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
        z_loss=z_loss, softcap=softcap, logit_scale=logit_scale, denominator=denominator,
        shift=shift, split_invariant=split_invariant, chunk_bytes=chunk_bytes,
        sample_weight=sample_weight, num_valid=num_valid, filter_eps=filter_eps,
    )  # fmt: skip
    check_flag(return_stats, "return_stats")
    scale = logit_scale if isinstance(logit_scale, Tensor) else None
    tensors = (input, linear_weight, linear_bias, scale)
    divisor = denominator if isinstance(denominator, Tensor) else None
    others = (weight, sample_weight, divisor)
    _refuse_other_gradients(*others)
    if isinstance(grad_scale, Tensor):
        require_one_device(input, {"grad_scale": grad_scale}, {})
    elif grad_scale is not None and not isinstance(grad_scale, (torch.SymFloat, torch.SymInt)):
        hint_value(grad_scale)
    differentiates_target = torch.is_grad_enabled() and is_differentiated(target)
    if differentiates_target or _is_traced(*tensors, target, *others):
        if accumulate_into is not None:
            raise RuntimeError(
                "mbkern: accumulate_into writes to a buffer in backward, for which there is no "
                "room under torch.compile and torch.func, in dispatch and function modes, with "
                "tensor subclasses, and where class probabilities require grad"
            )
        if differentiates_target or return_stats or _needs_formula(*tensors, target, *others):
            return _unfused(
                input, linear_weight, linear_bias, scale, target, head, grad_scale, loss_dtype,
                return_stats,
            )  # fmt: skip
        request = LinearRequest(head, *head_dtypes(input, linear_weight, target, loss_dtype))
        return linear_loss(input, linear_weight, linear_bias, scale, target, request)
    has_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if accumulate_into is not None:
        read = (input, linear_bias, target, scale, *others)
        buffers.check(accumulate_into, linear_weight, read)
        if has_graph and not linear_weight.requires_grad:
            raise ValueError(
                "mbkern: accumulate_into is given, and linear_weight does not require grad: "
                "nothing would be added"
            )
    request = LinearRequest(
        head, *head_dtypes(input, linear_weight, target, loss_dtype), grad_scale, accumulate_into,
        Collector(head.row.ignore_index, softcap) if return_stats else None,
    )  # fmt: skip
    loss: Tensor | None
    if has_graph:
        loss = LinearLoss.apply(*tensors, target, request)  # type: ignore[no-untyped-call]
        lse = request.lse
        if lse is not None:
            lse = LogSumExp.apply(*tensors, target, lse, request)  # type: ignore[no-untyped-call]
    else:
        loss, lse = _without_graph(tensors, target, request)
    stats = request.stats
    if stats is None or lse is None:
        return loss
    shape = [*input.shape[:-1], *linear_weight.shape[1:-1]]
    if head.shift:
        shape[input.dim() - 2] -= head.shift
    return loss, stats.finish(lse, request.kept, torch.Size(shape))


def _is_traced(*tensors: Tensor | None) -> bool:
    first, *rest = tensors
    assert first is not None
    return any(_traced.is_needed(first, t) for t in rest)


def _needs_formula(*tensors: Tensor | None) -> bool:
    """Where the operators will not do: transforms, export, and subclasses that see operations."""
    return (
        _traced.wants_formula()
        or torch._C._are_functorch_transforms_active()
        or any(t is not None and _sees_operations(t) for t in tensors)
    )


def _sees_operations(tensor: Tensor) -> bool:
    hidden = torch._C._disabled_torch_dispatch_impl
    kind = type(tensor)
    return kind.__torch_dispatch__ is not hidden and not issubclass(kind, FakeTensor)


def _without_graph(
    tensors: tuple[Any, ...], target: Tensor, request: LinearRequest
) -> tuple[Tensor | None, Tensor | None]:
    input, weight, bias, scale = tensors
    call = LinearCall(input, weight, bias, target, scale, request.options, request.dtype)
    stats = request.stats
    loss = call.run(Gradients(), divisor=call.divisor(), loss_dtype=request.loss_dtype, stats=stats)
    request.kept = call.kept
    return loss, None if stats is None else call.lse_of(stats)


def _unfused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    target: Tensor,
    options: LinearOptions,
    grad_scale: Number | None,
    loss_dtype: torch.dtype | None,
    return_stats: bool,
) -> Any:
    """All logits at once, for tracers and transforms."""
    dtype, loss_dtype = head_dtypes(input, weight, target, loss_dtype)
    rows = options.row
    seen: list[LinearStats] = []
    sample_weight = rows.sample_weight
    if sample_weight is not None:
        shape = [*input.shape[:-1], *weight.shape[1:-1]]
        if options.shift:
            shape[input.dim() - 2] -= options.shift
        sample_weight = per_item(sample_weight, shape).reshape(-1, *weight.shape[1:-1])

    def of_logits_and_target(z: Tensor, t: Tensor) -> Tensor:
        if return_stats:
            wide = capped(z.to(compute_dtype(z.dtype)), rows.softcap)
            shape = [*input.shape[:-1], *weight.shape[1:-1]]
            if options.shift:
                shape[input.dim() - 2] -= options.shift
            t = t if t.is_floating_point() else t.long()
            parts = of_logits(wide.detach(), t.detach(), rows.ignore_index)
            seen.append(gather(parts, torch.logsumexp(wide, 1).reshape(shape)))
        return cross_entropy(
            z, t, rows.weight, ignore_index=rows.ignore_index, reduction=rows.reduction,
            label_smoothing=rows.label_smoothing, sample_weight=sample_weight,
            grad_scale=grad_scale, z_loss=rows.z_loss, softcap=rows.softcap,
            denominator=rows.denominator, loss_dtype=loss_dtype,
        )  # fmt: skip

    loss = unfused(input, weight, bias, scale, target, options, dtype, of_logits_and_target)
    return (loss, seen[0]) if return_stats else loss
