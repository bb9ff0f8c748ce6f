"""The fused head: rows of logits, chunk by chunk, their losses, and their gradients in place.

A chunk of logits is all that is ever held of them. The gradient is formed over it, and goes on
into ``dX = G W``, ``dW += G^T X`` and ``db += sum G`` before the next chunk takes its place. ``dW``
and ``db`` are added into float32 (float64) memory, whatever the operands are: torch's own chunked
head adds in the weight's dtype, and loses a bfloat16 gradient's last bits with every chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbkern import _C
from mbkern import _launch_product as products
from mbkern._launch import (
    RowCall,
    RowOptions,
    converted,
    exact_add,
    exact_result,
    in_huge_pages,
    new_gradient,
)
from mbkern._linear_rows import LIMBS, LinearOptions, LinearRows
from mbkern._linear_stats import Collector, cap_slope, capped
from mbkern._losses import find
from mbkern._tensors import on_cuda, require_plain

_NUMBER = find("cross_entropy").number
_CHUNK_BYTES = 64 << 20  # more than the caches hold: torch's products take longer with fewer rows
_CHUNK_BYTES_CUDA = 512 << 20  # never measured
_PACKED_ROWS, _PACKED_TERMS = 128, 1 << 24  # from which our product is worth its packing
_TILE_ROWS = 16  # the same, where torch's takes longer per term


@dataclass(slots=True)
class Gradients:
    """Where gradients go, each None if not wanted.

    Attributes:
        input: (rows, in_features), in the dtype that the products are computed in.
        weight, bias: (classes, in_features) and (classes), float32 (float64), added into.
        scale: 0-dim float64, added into.
    """

    input: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None

    def any(self) -> bool:
        """Whether one is wanted."""
        return not (self.input is self.weight is self.bias is self.scale is None)


class LinearCall(LinearRows):
    """One call of the head: its rows, and how they are cut into chunks.

    Args:
        input: (*, in_features). weight: (classes, *inner, in_features). bias: (classes, *inner).
        target: class indices (*, *inner), or probabilities (*, classes, *inner).
        dtype: what the products are computed in: autocast's, or the operands' own.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: Tensor | None,
        options: LinearOptions,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(input, weight.shape, target, options, dtype)
        w = require_plain(weight.detach(), "weight")
        self.w = w.reshape(self.classes * self.items, input.shape[-1]).to(dtype)
        self.bias = self.scale = None
        if bias is not None:
            self.bias = require_plain(bias.detach(), "linear_bias").reshape(-1).contiguous()
        if scale is not None:
            self.scale = require_plain(scale.detach(), "logit_scale")
        # Own products where a fixed order is asked for, and where torch's are slower.
        self.fast = not on_cuda(self.x) and _C.isa() != "scalar"  # vectors of floats
        self.own = options.split_invariant or (
            self.fast and dtype is torch.float16 and not _has_fp16_products()
        )
        self.skip_below = 0.0  # of gradients of logits; set by run()
        self.logits_dtype = self.compute if self.own else dtype
        if not self.has_index:
            self.logits_dtype = torch.promote_types(self.logits_dtype, self.target.dtype)
        self.step = self._rows_of_chunk()
        self.own_input_gradient = self.own or (
            self.step >= _TILE_ROWS and not on_cuda(self.x) and products.beat_torch(dtype)
        )
        # torch's product of logits takes half as long again where their rows are not aligned. Ours
        # needs some rows to be worth its packing; in blocks it rounds at most 1.4 times as much.
        single = dtype is torch.float32
        unaligned = single and self.w.shape[0] * dtype.itemsize % 64 != 0
        large = self.step >= _PACKED_ROWS and self.step * self.w.numel() >= _PACKED_TERMS
        self.own_logits = (
            self.own or (self.fast and unaligned and large) or (self.own_input_gradient and single)
        )
        in_blocks = not self.own and self.w.shape[1] > products.BLOCK
        self.order_of_logits = products.BLOCKS if in_blocks else products.CHAIN

    # ---- chunks ----

    def _rows_of_chunk(self) -> int:
        return self._rows_for(self.w.shape[0])

    def _rows_for(self, width: int) -> int:
        """Rows of a chunk of logits of that width."""
        if self.options.chunk_rows is not None:
            return min(self.options.chunk_rows, max(1, self.count))
        asked = self.options.chunk_bytes
        if asked is None:
            asked = _CHUNK_BYTES_CUDA if on_cuda(self.x) else _CHUNK_BYTES
        of_row = width * self.logits_dtype.itemsize
        most = max(1, asked // max(1, of_row))
        chunks = max(1, -(-self.count // most))
        return max(1, -(-self.count // chunks))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each chunk, and the one behind its last."""
        for first in range(0, self.count, self.step):
            yield first, min(first + self.step, self.count)

    # ---- one chunk ----

    def _inputs(self, first: int, end: int) -> Tensor:
        if self.rows is None:
            return self.x[first:end]
        return self.x.index_select(0, self.rows[first:end])

    def _logits(self, x: Tensor, memory: Tensor) -> Tensor:
        z = memory[: x.shape[0]]
        number = self.options.logit_scale
        if self.own_logits:
            products.product(z, x.t(), self.w.t(), self.order_of_logits, fresh=True)
            if self.bias is not None:  # at the end: a chain from it would round each term there
                z.add_(self.bias.to(self.compute))
        else:
            # By the product where that is exact: a factor of 0 would hide what is not finite.
            alpha = number if number else 1.0
            number = None if number else number
            if self.bias is not None:
                bias = self.bias.to(self.dtype)
                torch.addmm(bias, x, self.w.t(), beta=alpha, alpha=alpha, out=z)
            elif alpha == 1.0:
                torch.mm(x, self.w.t(), out=z)
            else:
                torch.addmm(z, x, self.w.t(), beta=0.0, alpha=alpha, out=z)
        if z.dtype is not self.logits_dtype:  # class probabilities of a wider dtype
            z = z.to(self.logits_dtype)
        if number is not None:
            z.mul_(number)
        return z if self.scale is None else z.mul_(self.scale)

    def _spread(self, x: Tensor, g: Tensor, first: int, end: int, into: Gradients) -> None:
        """From the gradient of a chunk's logits to the others'; ``g`` may be changed."""
        if not self.own and g.dtype is not self.dtype:
            g = g.to(self.dtype)
        if into.input is not None or into.scale is not None:
            dx = self._input_gradient(g, first, end, into.input)
            if into.scale is not None:
                # sum G_ij z_ij, without another pass over z: G W is there, and z = X W^T + b.
                into.scale += torch.sum(dx.to(self.compute) * x, dtype=torch.float64)
                if self.bias is not None:
                    sums = self._sum_of_rows(g, torch.zeros_like(g[:1], dtype=self.compute)[0])
                    into.scale += torch.dot(sums.double(), self.bias.double())
            if self.scale is not None:
                dx = dx.to(self.compute) * self.scale
            if into.input is not None:
                self._keep(dx, first, end, into.input)
        skip_below = self.skip_below
        if self.scale is not None and (into.weight is not None or into.bias is not None):
            g.mul_(self.scale)
            if skip_below:  # of gradients that were multiplied
                self.skip_below = skip_below * abs(float(self.scale))
        if into.weight is not None:
            self._add_weight_gradient(x, g, into.weight)
        if into.bias is not None:
            self._sum_of_rows(g, into.bias)
        self.skip_below = skip_below

    def _sum_of_rows(self, g: Tensor, into: Tensor) -> Tensor:
        """Add the rows of ``g`` up, into memory of full precision."""
        if on_cuda(g) and not self.own:
            return into.add_(g.sum(0, dtype=self.compute))
        ones = torch.ones(1, dtype=self.compute, device=g.device).expand(g.shape[0], 1)
        products.product(into.unsqueeze(0), ones, g)
        return into

    def _input_gradient(self, g: Tensor, first: int, end: int, out: Tensor | None) -> Tensor:
        """``G W``; of full precision where it is ours."""
        direct = self.rows is None and self.scale is None
        place = out[first:end] if out is not None and direct else None
        if self.own_input_gradient or self.skip_below:
            dx = place
            if dx is None or dx.dtype is not self.compute or not dx.is_contiguous():
                shape = (g.shape[0], self.w.shape[1])
                dx = torch.empty(shape, dtype=self.compute, device=g.device)
            order = products.BLOCKS if self.own else self._order(g)
            order = products.BLOCKS if order == products.CHAIN else order
            skip_below = self.skip_below
            return products.product(dx, g.t(), self.w, order, fresh=True, skip_below=skip_below)
        if place is None:  # or autocast, if backward runs under it, would round what it multiplies
            place = torch.empty((g.shape[0], self.w.shape[1]), dtype=g.dtype, device=g.device)
        return torch.mm(g, self.w, out=place)

    def _keep(self, dx: Tensor, first: int, end: int, out: Tensor) -> None:
        dx = converted(dx, out.dtype)
        if self.rows is not None:
            out.index_copy_(0, self.rows[first:end], dx)
        elif dx.data_ptr() != out[first:end].data_ptr():
            out[first:end] = dx

    def _add_weight_gradient(self, x: Tensor, g: Tensor, into: Tensor) -> None:
        if self.own:
            products.product(into, g, x, skip_below=self.skip_below)
        elif not on_cuda(g) and (self.fast or self.skip_below):
            if self.compute is torch.float64 and not self.skip_below:
                into.addmm_(g.t(), x)
                return
            products.product(into, g, x, self._order(g), skip_below=self.skip_below)
        elif g.dtype is into.dtype:
            into.addmm_(g.t(), x)
        elif on_cuda(g) and _has_wide_sums():
            torch.addmm(into, g.t(), x, out_dtype=into.dtype, out=into)
        elif on_cuda(g) and _has_out_dtype():
            into += torch.mm(g.t(), x, out_dtype=into.dtype)
        else:
            into.addmm_(g.t().to(into.dtype), x.to(into.dtype))

    def _order(self, g: Tensor) -> int:
        """The faster order of a product with ``g``."""
        pairs = g.dtype is torch.bfloat16 and products.has_pairs()
        return products.PAIRS if pairs else products.CHAIN

    def _filter(
        self, scale: float | Tensor, item_scale: Tensor | None, divisor: float | Tensor
    ) -> float:
        """The gradient of a logit whose softmax is ``filter_eps``, at the largest finite weight:
        under an infinite one no gradient is small."""
        if not self.options.filter_eps or not float(divisor):
            return 0.0
        largest = abs(float(scale) / float(divisor))
        rows = self.options.row
        for weights in (item_scale, self.sample_weight, rows.weight if self.has_index else None):
            if weights is not None and weights.numel():
                largest *= float(weights.abs().nan_to_num(0.0, 0.0).max())
        return self.options.filter_eps * largest if math.isfinite(largest) else 0.0

    # ---- all chunks ----

    def new_state(self) -> Tensor:
        """Memory for what is saved of every item, chunk behind chunk; see RowCall.new_state."""
        per_item = 2 if self.has_index else 3
        size = per_item * self.count * self.items
        return torch.empty(size, dtype=self.compute, device=self.x.device)

    def new_input_gradient(self) -> Tensor:
        """Memory for the input's gradient; 0 where no row is computed."""
        out = new_gradient(self.x)
        return out if self.rows is None else out.zero_()

    def run(
        self,
        into: Gradients,
        *,
        divisor: float | Tensor,
        scale: float | Tensor = 1.0,
        item_scale: Tensor | None = None,
        state: Tensor | None = None,
        from_state: bool = False,
        loss_dtype: torch.dtype | None = None,
        loss_sum: Tensor | None = None,
        stats: Collector | None = None,
    ) -> Tensor | None:
        """Compute all chunks; return the loss, unless ``from_state``.

        Args:
            into: the gradients that are wanted.
            divisor: of a mean.
            scale, item_scale: multiply the gradient.
            state: written, or with ``from_state`` read.
            loss_sum: of an exact sum; receives every item's term.
            stats: sees every chunk's logits.
        """
        rows = self.options.row
        device = self.x.device
        if self.options.logit_scale is not None:  # from the logits' gradient to the product's
            wide = scale.double() if isinstance(scale, Tensor) else scale
            scale = wide * self.options.logit_scale
        if into.any():
            self.skip_below = self._filter(scale, item_scale, divisor)
        shape = (self.step, self.w.shape[0])
        memory = in_huge_pages(torch.empty(shape, dtype=self._memory_dtype, device=device))
        total: Tensor | None = None
        sums: list[Tensor] = []
        exact = self.compute is torch.float32
        if exact and not from_state:
            total = torch.zeros(LIMBS, dtype=torch.int64, device=device)
        per_item = 2 if self.has_index else 3
        mean = rows.reduction == "mean"
        for first, end in self.chunks():
            x = self._inputs(first, end)
            z = self._logits(x, memory)
            logits = z.view(end - first, self.classes, self.items) if self.inner else z
            if stats is not None:
                stats.see(logits, self.target[first:end], self.compute)
            weights = None if self.sample_weight is None else self.sample_weight[first:end]
            options = RowOptions(
                rows.weight, weights, rows.ignore_index, rows.label_smoothing, rows.z_loss,
                rows.softcap, rows.reduction, divisor if mean and not from_state else None,
            )  # fmt: skip
            target = self.target[first:end]
            if not self.has_index:
                target = target.to(self.logits_dtype)
            call = RowCall(_NUMBER, logits, target, options)
            arguments: dict[str, Any] = {"scale": scale, "loss_dtype": self.compute}
            if into.any():
                arguments["grad"] = logits
            if item_scale is not None:
                arguments["item_scale"] = item_scale[first:end]
            if state is not None:
                begin, stop = (k * self.items * per_item for k in (first, end))
                arguments["state"] = state[begin:stop].view(per_item, -1)
            if from_state:
                arguments |= {"from_state": True, "divisor": divisor}
            elif exact and rows.reduction != "none":
                arguments["loss_sum"] = total
            value, _ = call.run(**arguments)
            if value is not None:
                sums.append(value)
            if into.any():
                self._spread(x, z, first, end, into)
        if from_state:
            return None
        return self._loss(sums, total, divisor, loss_dtype or self.dtype, loss_sum)

    def lse_of(self, stats: Collector) -> Tensor:
        """(rows, inner) of all items, of what ``stats`` has seen."""
        like = torch.empty(0, dtype=self.compute, device=self.x.device)
        return stats.log_sum_exp(self.kept, like, torch.Size((self.loss_rows, self.items)))

    def run_log_sum_exp(self, into: Gradients, incoming: Tensor) -> None:
        """Compute the gradients of the log-sum-exp of every item: d lse / d z_j = p_j."""
        shape = (self.step, self.w.shape[0])
        memory = in_huge_pages(torch.empty(shape, dtype=self._memory_dtype, device=self.x.device))
        softcap, number = self.options.row.softcap, self.options.logit_scale
        factors = self.of_kept(incoming).reshape(-1, 1, self.items)
        if number is not None:
            factors = factors * number
        if self.has_index:
            ignored = self.target == self.options.row.ignore_index
            factors = factors.masked_fill(ignored.reshape(factors.shape), 0)
        for first, end in self.chunks():
            x = self._inputs(first, end)
            z = self._logits(x, memory)
            logits = z.view(end - first, self.classes, self.items)
            rows = max(1, (2 << 20) // max(1, 4 * self.w.shape[0]))
            for part, factor in zip(
                torch.split(logits, rows), torch.split(factors[first:end], rows), strict=True
            ):
                wide = part.to(self.compute)
                p = torch.softmax(capped(wide, softcap), 1).mul_(factor)
                if softcap is not None:
                    p = p * cap_slope(wide, softcap)
                part.copy_(p)
            self._spread(x, z, first, end, into)

    @property
    def _memory_dtype(self) -> torch.dtype:
        return self.logits_dtype if self.own else self.dtype

    def _loss(
        self, values: list[Tensor], total: Tensor | None, divisor: float | Tensor,
        dtype: torch.dtype, loss_sum: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The reduced loss, of exact sums where there are; or one loss an item, 0 where ignored."""
        if self.options.row.reduction == "none":
            losses = None
            if values:
                losses = torch.cat([v.reshape(v.shape[0], self.items) for v in values])
            if losses is None:
                losses = torch.empty(0, self.items, dtype=self.compute, device=self.x.device)
            if total is not None and loss_sum is not None:
                exact_add(loss_sum, losses)
            if self.kept is not None:
                whole = losses.new_zeros(self.loss_rows, self.items)
                losses = whole.index_copy_(0, self.kept, losses)
            return converted(losses.reshape(self.shape), dtype)
        if total is None:
            zero = torch.zeros((), dtype=self.compute, device=self.x.device)
            value = sum(values, zero)
            if not values and self.options.row.reduction == "mean":
                value = value / divisor
            return value.to(dtype)
        if loss_sum is not None:
            loss_sum += total
        mean = self.options.row.reduction == "mean"
        return exact_result(total, divisor if mean else None, dtype)


def _has_fp16_products() -> bool:
    """Whether torch multiplies fp16 on this processor, or widens number by number: ten times the
    time of our product."""
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return probe is None or bool(probe())


def _has_out_dtype() -> bool:
    """Whether torch multiplies 16-bit matrices into float32 on CUDA (since 2.8)."""
    return hasattr(torch.ops.aten.mm, "dtype")


def _has_wide_sums() -> bool:
    """Whether it adds such a product to what is there: from 2.11 on. Before, there is the function,
    but what is added to must have the type of the matrices (pytorch/pytorch#167931)."""
    major, minor = (int(number) for number in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 11)
