"""Random batches of every make, each with what its cuts must be; for test_micro_batches_random.py.

A make returns a value and a function from rows to the expected cut of it. Expected values are built
from the parts, by each class's own way, so nothing of mbkern is used here.
"""

from __future__ import annotations

import random
from collections import ChainMap, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch

Cut = Callable[[slice], Any]
Made = tuple[Any, Cut]
Pair = namedtuple("Pair", "x y")


class Named(namedtuple("Named", "x y")):
    """Of other arguments than its fields, and with an attribute."""

    def __new__(cls, pair: tuple[Any, Any], tag: str) -> Named:
        made = super().__new__(cls, *pair)
        made.tag = tag
        return made


class Tagged(list[Any]):
    def __init__(self, entries: Any, tag: str) -> None:
        super().__init__(entries)
        self.tag = tag


class Two(tuple[Any, ...]):
    def __new__(cls, a: Any, b: Any) -> Two:
        return super().__new__(cls, (a, b))


class ReadOnly(Mapping[str, Any]):
    def __init__(self, data: Mapping[str, Any], tag: str = "") -> None:
        self._data, self.tag = dict(data), tag

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class Store(ReadOnly, MutableMapping[str, Any]):
    """Its entries lie in an attribute, which a shallow copy shares."""

    def __setitem__(self, key: str, value: Any) -> None:
        self._data[key] = value

    def __delitem__(self, key: str) -> None:
        del self._data[key]


class Slotted(Store):
    """The same, without a ``__dict__`` of its own keys' names."""

    __slots__ = ("_hidden",)

    def __init__(self, data: Mapping[str, Any], tag: str) -> None:
        super().__init__({}, tag)
        self._hidden = dict(data)

    def __getitem__(self, key: str) -> Any:
        return self._hidden[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._hidden[key] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._hidden)

    def __len__(self) -> int:
        return len(self._hidden)


class Cased(Store):
    """Keeps (key, entry) pairs: no attribute holds the entries themselves."""

    def __init__(self, data: Mapping[str, Any], tag: str = "") -> None:
        super().__init__({}, tag)
        for key, value in data.items():
            self[key] = value

    def __getitem__(self, key: str) -> Any:
        return self._data[key.lower()][1]

    def __setitem__(self, key: str, value: Any) -> None:
        self._data[key.lower()] = (key, value)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self._data.values())


class Attributes(dict[str, Any]):
    """Entries are attributes, in one dict."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.__dict__ = self


class Getter(dict[str, Any]):
    """Entries are attributes, by lookup; what is missing is a KeyError."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class Mirror(dict[str, Any]):
    """Entries are attributes, copied there at the start."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.__dict__.update(data)


@dataclass
class Plain:
    x: Any
    y: Any = None

    @cached_property
    def both(self) -> tuple[Any, Any]:
        return self.x, self.y


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Any
    y: Any


@dataclass
class Child(Plain):
    z: Any = 3
    start: InitVar[Any] = None
    made: Any = field(init=False, default=None)

    def __post_init__(self, start: Any) -> None:
        if start is None:
            raise AssertionError("a part is made without it")
        self.made = self.y


@dataclass(kw_only=True)
class Keywords:
    x: Any
    y: Any


def _tensor(rng: random.Random, n: int, g: torch.Generator) -> Made:
    shape = rng.choice([(n,), (n, 2), (n, 0), (n, 2, 3)])
    kind = rng.randrange(6)
    if kind == 0:
        whole: Any = torch.randn(shape, generator=g).numpy()
        return whole, lambda rows: whole[rows]
    if kind == 1:
        whole = torch.randn(2, n, generator=g).t()
    elif kind == 2:
        whole = torch.randn(2 * n, generator=g)[::2].requires_grad_()
    elif kind == 3:
        whole = torch.randn(1, 3, generator=g).expand(n, 3)
    elif kind == 4:
        whole = torch.randint(9, shape, generator=g)
    else:
        whole = torch.randn(shape, generator=g, requires_grad=rng.random() < 0.3)
    return whole, lambda rows: whole[rows]


def _same(value: Any) -> Made:
    return value, lambda rows: value


def _leaf(rng: random.Random, n: int, g: torch.Generator) -> Made:
    if rng.random() < 0.5:
        return _tensor(rng, n, g)
    same = [None, 3, 2.5, True, "text", b"bytes", torch.tensor(2.0), np.float32(1), (224, 224), (),
            [], {}, SimpleNamespace(x=1), Plain, {1, 2}, torch.Size([3, 4]), range(3),
            (torch.tensor(1), torch.tensor(2)), torch.float32, slice(1, 2)]  # fmt: skip
    if n == 0 or rng.random() < 0.6:
        return _same(rng.choice(same))
    lists: list[Any] = [
        [f"{k}.png" for k in range(n)], tuple(f"{k}" for k in range(n)), list(range(n)),
        [torch.tensor(k) for k in range(n)], [{"k": k} for k in range(n)],
        [[k] * k for k in range(n)], [None] * n,
    ]  # fmt: skip
    whole = rng.choice(lists)
    return whole, lambda rows: whole[rows]


def _sequence(rng: random.Random, parts: list[Made]) -> Made:
    values = [value for value, _ in parts]

    def of(rows: slice) -> list[Any]:
        return [cut(rows) for _, cut in parts]

    kind = rng.randrange(6)
    if kind == 0:
        return values, of
    if kind == 1:
        return tuple(values), lambda rows: tuple(of(rows))
    if kind == 2:
        return Tagged(values, "t"), lambda rows: Tagged(of(rows), "t")
    if kind == 3:
        return Pair(*values[:2]), lambda rows: Pair(*of(rows)[:2])
    if kind == 4:
        return Named(tuple(values[:2]), "t"), lambda rows: Named(tuple(of(rows)[:2]), "t")
    return Two(*values[:2]), lambda rows: Two(*of(rows)[:2])


def _mapping(rng: random.Random, parts: list[Made]) -> Made:
    makes: list[Callable[[dict[str, Any]], Any]] = [
        dict, OrderedDict, lambda d: defaultdict(list, d), UserDict, MappingProxyType, ChainMap,
        lambda d: Store(d, "t"), lambda d: Slotted(d, "t"), Cased, lambda d: ReadOnly(d, "t"),
        Attributes, Getter, Mirror,
    ]  # fmt: skip
    make = rng.choice(makes)
    names = ["x", "Y", "zz"]
    whole = make({name: value for name, (value, _) in zip(names, parts, strict=False)})
    return whole, lambda rows: make(
        {name: cut(rows) for name, (_, cut) in zip(names, parts, strict=False)}
    )


def _dataclass(rng: random.Random, parts: list[Made]) -> Made:
    (x, cut_x), (y, cut_y) = parts[:2]
    kind = rng.randrange(4)
    if kind == 0:
        whole: Any = Plain(x, y)
        if rng.random() < 0.5:
            assert whole.both is whole.both  # kept
        return whole, lambda rows: Plain(cut_x(rows), cut_y(rows))
    if kind == 1:
        return Frozen(x, y), lambda rows: Frozen(cut_x(rows), cut_y(rows))
    if kind == 2:
        return Child(x, y, start=1), lambda rows: Child(cut_x(rows), cut_y(rows), start=1)
    return Keywords(x=x, y=y), lambda rows: Keywords(x=cut_x(rows), y=cut_y(rows))


def make(rng: random.Random, n: int, depth: int, g: torch.Generator) -> Made:
    """A random value of ``n`` items, and its cuts."""
    if depth == 0:
        return _leaf(rng, n, g)
    parts = [_tensor(rng, n, g)]
    parts += [make(rng, n, rng.randrange(depth), g) for _ in range(rng.randint(1, 2))]
    parts[:2] = rng.sample(parts[:2], 2)  # some containers take two
    return rng.choice([_sequence, _mapping, _dataclass])(rng, parts)
