"""Containers of every class with other entries: what a cut gives back is of the batch's types."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, MutableMapping
from functools import cached_property
from typing import Any


def copied(value: Any) -> Any:
    """A shallow copy, without what ``cached_property`` keeps: that was computed from all items."""
    cut = copy.copy(value)
    if cut is value:
        raise TypeError(
            f"mbkern: a {type(value).__name__} cannot be cut: copy.copy gives the same object"
        )
    for name in _cached(value):
        _attributes(cut).pop(name, None)
    return cut


def _cached(value: Any) -> list[str]:
    """Attributes that a ``cached_property`` has made."""
    kind = type(value)
    return [
        name
        for name in _attributes(value)
        if isinstance(inspect.getattr_static(kind, name, None), cached_property)
    ]


def sequence_with(value: tuple[Any, ...] | list[Any], entries: list[Any]) -> Any:
    """A list or tuple, named or of a class of the user's, with these entries."""
    kind: Any = type(value)
    if kind in (tuple, list):
        return kind(entries)
    # Not by the class's own __new__ and __init__, which may take other arguments than entries.
    if isinstance(value, list):
        cut = list.__new__(kind)
        list.extend(cut, entries)
    else:
        try:
            cut = tuple.__new__(kind, entries)
        except TypeError:  # torch.return_types
            return kind(entries)
    cached = _cached(value)
    _attributes(cut).update({k: v for k, v in _attributes(value).items() if k not in cached})
    for name in _slots(kind):
        if hasattr(value, name):
            object.__setattr__(cut, name, getattr(value, name))
    return cut


def mapping_with(value: Mapping[Any, Any], entries: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the same class and with the same attributes, and these entries.

    Raises:
        TypeError: its copies share their entries with it, and its class takes no dict.
    """
    if type(value) is dict:
        return entries
    cut: Mapping[Any, Any] | None = _copy_with(value, entries)
    if cut is None:
        kind: Any = type(value)
        try:
            cut = kind(entries)
        except Exception as error:
            raise TypeError(
                f"mbkern: a {kind.__name__} cannot be cut: it gives no copy with entries of its "
                f"own, and {kind.__name__}(dict) raises {type(error).__name__}: {error}. Make it "
                "a dict"
            ) from error
    assert cut is not None
    return cut


def _copy_with(value: Any, entries: dict[Any, Any]) -> Any:
    """A copy with other entries, or None; the original is as it was."""
    try:
        cut = copied(value)
    except Exception:
        return None
    stores = [] if isinstance(value, dict) else _stores(value)
    for name, store in stores:
        own = copy.copy(store)
        if not isinstance(value, MutableMapping):
            own = mapping_with(store, entries)
        object.__setattr__(cut, name, own)
    if isinstance(value, MutableMapping):
        if not _set(cut, value, entries):
            return None
    elif not stores:
        return None
    # Attributes that show the entries: of classes such as ``self.__dict__ = self``, or copies.
    attributes = _attributes(cut)
    if _attributes(value) is value:
        object.__setattr__(cut, "__dict__", cut)
    elif attributes is not cut:
        for name, shown in [*attributes.items()]:
            if name in entries and shown is value[name]:
                attributes[name] = entries[name]
    return cut


def _set(cut: Any, value: Any, entries: dict[Any, Any]) -> bool:
    """Whether a copy took the entries, and the original has kept its own."""
    for key, entry in entries.items():
        old = value[key]
        try:
            cut[key] = entry
        except Exception:
            return False
        if entry is not old and value[key] is entry:  # the copy's entries are the original's
            value[key] = old
            return False
    return True


def _stores(value: Any) -> list[tuple[str, Any]]:
    """Attributes of a mapping that hold its entries, by their names."""
    found = []
    for name in [*_attributes(value), *_slots(type(value))]:
        held = _attributes(value).get(name) or getattr(value, name, None)
        if isinstance(held, Mapping) and held is not value and _same(held, value):
            found.append((name, held))
    return found


def _slots(kind: type) -> list[str]:
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else [*slots]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _same(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
    return len(a) == len(b) and all(key in a and a[key] is entry for key, entry in b.items())


def _attributes(value: Any) -> dict[str, Any]:
    """Its ``__dict__``; not by ``getattr``, which a class may have of its own."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found
