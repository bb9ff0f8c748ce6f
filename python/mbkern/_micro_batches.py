"""A mini-batch, whatever it is made of, cut into micro-batches."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from mbkern._micro_batches_rebuilt import copied, mapping_with, sequence_with

Batch = TypeVar("Batch")


class MicroBatches(Sequence[Batch], Generic[Batch]):
    """The micro-batches of a batch, cut out when they are asked for; see :func:`micro_batches`.

    Attributes:
        items: how many items the batch has.
        size: items of each micro-batch but a shorter last one.
    """

    def __init__(self, batch: Batch, items: int, size: int, kinds: _Kinds) -> None:
        self._batch, self.items, self.size = batch, items, size
        self._kinds = kinds

    @property
    def sizes(self) -> list[int]:
        """Items of each micro-batch."""
        starts = range(0, self.items, self.size)
        return [min(self.size, self.items - start) for start in starts]

    def __len__(self) -> int:
        return -(-self.items // self.size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = operator.index(index)
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"mbkern: micro-batch {index} of {len(self)}")
        start = number * self.size
        rows = slice(start, min(start + self.size, self.items))
        cut: Batch = _cut(self._batch, rows, self._kinds)
        return cut

    def __repr__(self) -> str:
        return f"MicroBatches({len(self)} of {self.size}, {self.items} items)"


def micro_batches(batch: Batch, plan_or_size: Any) -> MicroBatches[Batch]:
    """Cut a batch into micro-batches along dimension 0; the last one may be shorter.

    ::

        for part in mbkern.micro_batches({"ids": ids, "labels": labels}, 8):
            loss = model(**part)

    What belongs to which item is decided by type, never by a length that happens to fit:

    - Tensors and NumPy arrays of one or more dimensions are cut, into views; 0-dim ones, numbers,
      strings, None and objects of other types are passed on to every micro-batch.
    - Dicts and other mappings (transformers' ``BatchEncoding`` too), named tuples, dataclasses,
      tuples, and lists with a tensor somewhere in them are cut entry by entry; the results are of
      the same types, made without their constructors. Attributes beside the entries are kept, but
      for what a ``cached_property`` has computed from all items.
    - A list without tensors, and a tuple of strings, have an entry for each item (file names,
      texts), and are cut; so is a list of 0-dim tensors. Empty ones are passed on.
    - So a list or tuple of tensors is taken for several tensors of all items. One that has a tensor
      for each item (images of different sizes, texts that are not padded) is not to be cut here:
      each of them would be. Stack or pad them before.

    Args:
        batch: the items; any nesting of the above with at least one tensor or array that is cut.
        plan_or_size: items in a micro-batch, at least 1; or what :func:`mbkern.plan` returned. A
            batch smaller than that is one micro-batch.

    Returns:
        A sequence with the number of micro-batches as its length, their ``sizes``, and ``items``;
        it holds the batch, and cuts at each access. A batch of no items has no micro-batches.

    Raises:
        ValueError: a size below 1; tensors or lists with different numbers of items (both are
            named); nothing to cut; a batch that contains itself.
        TypeError: a size that is no integer; packed sequences, nested and sparse tensors. At an
            access: an object of a class whose copies share their entries with it.
    """
    size = _size(plan_or_size)
    found: list[tuple[str, int]] = []
    kinds = _Kinds()
    try:
        _lengths(batch, "batch", found, kinds)
        cut = bool(found) and _has_tensor(batch)
    except RecursionError:
        raise ValueError("mbkern: the batch contains itself, or is nested too deeply") from None
    if not cut:
        raise ValueError(
            "mbkern: nothing to cut: the batch has no tensor or array of one or more dimensions in "
            f"it; it is {_name(batch)}"
        )
    first, items = found[0]
    for path, length in found:
        if length != items:
            raise ValueError(
                f"mbkern: {first} has {items} items and {path} has {length}; all must agree. What "
                "belongs to no item stays whole as a 0-dim tensor, a number, a tuple of numbers, "
                "or outside the batch; a list with a tensor for each item must be stacked"
            )
    return MicroBatches(batch, items, size, kinds)


def _size(given: Any) -> int:
    value = getattr(given, "micro_batch", given)
    if isinstance(value, bool):
        raise TypeError(f"mbkern: the size of micro-batches must be an integer, not {value}")
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(
            "mbkern: the size of micro-batches must be an integer or a plan, not "
            f"{_name(value)} {value!r}"
        ) from None
    if size < 1:
        raise ValueError(f"mbkern: the size of micro-batches is {size}; it must be at least 1")
    return size


def _name(value: Any) -> str:
    return type(value).__name__


def _is_array(value: Any) -> bool:
    """Whether it is cut: a 0-dim tensor is a number."""
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _entries(value: Any) -> list[tuple[str, Any]]:
    """What a container holds, with how each entry is reached; nothing for what is none."""
    if isinstance(value, str | int | float | Tensor) or value is None:  # most of them, and fast
        return []
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", entry) for key, entry in value.items()]
    if _is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return [(f".{name}", getattr(value, name)) for name in fields]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", entry) for name, entry in zip(value._fields, value, strict=True)]
    if isinstance(value, tuple | list):
        return [(f"[{k}]", entry) for k, entry in enumerate(value)]
    return []


def tensors_in(value: Any) -> Iterator[Any]:
    """All tensors and arrays in a batch, 0-dim ones too."""
    if isinstance(value, Tensor | np.ndarray):
        yield value
    for _, entry in _entries(value):
        yield from tensors_in(entry)


def _has_tensor(value: Any) -> bool:
    return _is_array(value) or any(_has_tensor(entry) for _, entry in _entries(value))


class _Kinds:
    """Which lists and tuples have an entry for each item; looked at once, as that takes long."""

    def __init__(self) -> None:
        # By identity; they are held, so that no other object gets the same.
        self._known: dict[int, tuple[Any, bool]] = {}

    def per_item(self, value: Any) -> bool:
        """Whether a list or tuple has an entry for each item, and no tensors to cut within."""
        if not isinstance(value, tuple | list):
            return False
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = value, _is_per_item(value)
        return known[1]


def _is_per_item(value: tuple[Any, ...] | list[Any]) -> bool:
    if type(value) is tuple:
        return bool(value) and all(isinstance(entry, str | bytes) for entry in value)
    return isinstance(value, list) and bool(value) and not _has_tensor(value)


def _lengths(value: Any, path: str, found: list[tuple[str, int]], kinds: _Kinds) -> None:
    """The number of items of everything that will be cut."""
    if isinstance(value, PackedSequence):
        raise TypeError(f"mbkern: {path} is a PackedSequence, which has no rows to cut; pad it")
    if isinstance(value, Tensor) and (value.is_nested or value.layout is not torch.strided):
        kind = "a nested tensor" if value.is_nested else f"of layout {value.layout}"
        raise TypeError(f"mbkern: {path} is {kind}; only dense tensors have views of rows")
    if _is_array(value) or kinds.per_item(value):
        found.append((path, len(value)))
        return
    for place, entry in _entries(value):
        _lengths(entry, path + place, found, kinds)


def _cut(value: Any, rows: slice, kinds: _Kinds) -> Any:
    """The same structure with these items only."""
    if _is_array(value):
        return value[rows]
    if kinds.per_item(value):
        return sequence_with(value, [*value[rows]])
    if isinstance(value, Mapping):
        return _cut_mapping(value, rows, kinds)
    if _is_dataclass(value):
        cut = copied(value)
        for place, entry in _entries(value):
            object.__setattr__(cut, place[1:], _cut(entry, rows, kinds))  # frozen ones, too
        return cut
    if isinstance(value, tuple | list):
        entries = [_cut(entry, rows, kinds) for entry in value]
        if all(new is old for new, old in zip(entries, value, strict=True)):
            return value
        return sequence_with(value, entries)
    return value


def renewed(value: Any) -> Any:
    """The same tensors in containers of its own: what a step takes out of them stays in the old."""
    if isinstance(value, Mapping):
        return mapping_with(value, {key: renewed(entry) for key, entry in value.items()})
    if _is_dataclass(value):
        new = copied(value)
        for place, entry in _entries(value):
            object.__setattr__(new, place[1:], renewed(entry))
        return new
    if isinstance(value, tuple | list):
        plain = all(type(entry) in (int, str, float, bool) for entry in value)  # many, often
        entries = [*value] if plain else [renewed(entry) for entry in value]
        same = all(new is old for new, old in zip(entries, value, strict=True))
        return value if same and isinstance(value, tuple) else sequence_with(value, entries)
    return value


def _cut_mapping(value: Mapping[Any, Any], rows: slice, kinds: _Kinds) -> Mapping[Any, Any]:
    cut = mapping_with(value, {key: _cut(entry, rows, kinds) for key, entry in value.items()})
    encodings = getattr(value, "__dict__", {}).get("_encodings")
    if isinstance(encodings, list) and "_encodings" not in value:
        # A BatchEncoding's tokens, one for each item.
        cut._encodings = encodings[rows]  # type: ignore[attr-defined]
    return cut
