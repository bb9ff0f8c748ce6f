"""Random batches are cut as each of their classes would be; and what the random ones found."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import micro_batch_makes as makes
import numpy as np
import pytest
import torch
from torch import Tensor

import mbkern
from mbkern._micro_batches import renewed

pytestmark = pytest.mark.cpu


def assert_same(got: Any, want: Any, path: str) -> None:
    """The same classes, entries, attributes; tensors with the same memory."""
    assert type(got) is type(want), (path, type(got), type(want))
    if isinstance(want, Tensor):
        assert got.shape == want.shape, path
        assert got.stride() == want.stride(), path
        assert got.data_ptr() == want.data_ptr(), path
        assert got.requires_grad == want.requires_grad, path
        return
    if isinstance(want, np.ndarray):
        assert got.__array_interface__ == want.__array_interface__, path
        return
    if isinstance(want, Mapping):
        assert list(got) == list(want), path
        for key in want:
            assert_same(got[key], want[key], f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(want) and not isinstance(want, type):
        for field in dataclasses.fields(want):
            name = field.name
            assert_same(getattr(got, name), getattr(want, name), f"{path}.{name}")
    elif isinstance(want, tuple | list):
        assert len(got) == len(want), path
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{path}[{k}]")
    else:
        assert got is want or got == want, path
        return
    for name in ("x", "tag", "both"):
        with contextlib.suppress(AttributeError, KeyError):
            shown = getattr(want, name)
            assert_same(getattr(got, name), shown, f"{path}.{name}")


def play(seed: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n = rng.choice([0, 1, 2, 3, 7, 8])
    state = rng.getstate()
    batch, cut = makes.make(rng, n, rng.randint(1, 3), g)
    parts = mbkern.micro_batches(batch, size := rng.choice([1, 2, 3, 5, n + 1, 100]))
    assert parts.items == n, (seed, state)
    assert len(parts) == len(parts.sizes) == -(-n // size)
    for _ in range(2):  # the first cuts have changed nothing
        for k, part in enumerate(parts):
            rows = slice(k * size, min(n, (k + 1) * size))
            assert_same(part, cut(rows), f"seed {seed}: batch")
    assert_same(batch, cut(slice(0, n)), f"seed {seed}: the batch itself")
    assert_same(renewed(batch), cut(slice(0, n)), f"seed {seed}: renewed")


@pytest.mark.parametrize("first", range(0, 600, 200))
def test_random_batches_are_cut_as_their_classes_say(first: int) -> None:
    for seed in range(first, first + 200):
        play(seed)


# ---- each by itself ------------------------------------------------------------------------------


def x() -> Tensor:
    return torch.arange(14).view(7, 2)


def test_a_mapping_of_the_users_own_is_not_emptied() -> None:
    """A shallow copy shares its entries: the first cut was written into the batch itself."""
    batch = makes.Store({"x": x()}, "t")
    parts = mbkern.micro_batches(batch, 3)
    assert [len(part["x"]) for part in parts] == [3, 3, 1]
    assert len(batch["x"]) == 7


@pytest.mark.parametrize("kind", [makes.Attributes, makes.Mirror, makes.Getter])
def test_attributes_show_what_was_cut(kind: Any) -> None:
    part = mbkern.micro_batches(kind({"x": x()}), 3)[1]
    assert part.x is part["x"]
    assert part.x.tolist() == x()[3:6].tolist()


def test_what_was_computed_from_all_items_is_computed_again() -> None:
    batch = makes.Plain(x())
    assert len(batch.both[0]) == 7
    assert [len(part.both[0]) for part in mbkern.micro_batches(batch, 3)] == [3, 3, 1]


class Counted(list[Any]):
    looked = 0

    def __iter__(self) -> Any:
        self.looked += 1
        return super().__iter__()


def test_lists_are_looked_at_once() -> None:
    """Each cut looked at every entry of every list: 64 cuts of 512 lists of tokens took 35 s."""
    texts = Counted("abcdefg")
    parts = mbkern.micro_batches({"x": x(), "texts": texts}, 1)
    before = texts.looked
    assert [part["texts"] for part in parts] == [[c] for c in "abcdefg"]
    assert type(parts[0]["texts"]) is Counted
    assert texts.looked == before


class Pairs(makes.Cased):
    def __init__(self, keys: list[str], values: list[Any]) -> None:
        super().__init__(dict(zip(keys, values, strict=True)))


@dataclasses.dataclass
class Single:
    x: Any

    def __copy__(self) -> Single:
        return self


def test_what_cannot_be_cut_is_refused_and_stays_as_it_was() -> None:
    pairs, single = Pairs(["x"], [x()]), Single(x())
    for batch, message in ((pairs, r"^mbkern: a Pairs cannot be cut: .*missing.*Make it a dict"),
                           (single, "^mbkern: a Single cannot be cut: copy.copy")):  # fmt: skip
        parts = mbkern.micro_batches(batch, 3)
        with pytest.raises(TypeError, match=message):
            parts[0]
    assert len(pairs["x"]) == len(single.x) == 7


def test_a_batch_that_contains_itself() -> None:
    batch: list[Any] = [x()]
    batch.append(batch)
    with pytest.raises(ValueError, match=r"^mbkern: the batch contains itself"):
        mbkern.micro_batches(batch, 3)


def test_an_index_that_is_none() -> None:
    for index in ("x", 1.5, None):
        with pytest.raises(TypeError, match="integer"):
            mbkern.micro_batches(x(), 3)[index]  # type: ignore[index]
    assert len(mbkern.micro_batches(x(), 3)[torch.tensor(2)]) == 1
