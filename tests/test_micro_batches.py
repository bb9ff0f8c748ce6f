"""Batches of every make are cut into micro-batches, or refused with the values."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mbkern

pytestmark = pytest.mark.cpu
Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float
    computed: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", self.x.sum())


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding is made."""

    def __init__(self, data: dict[str, Any], encodings: list[str]) -> None:
        super().__init__(data)
        self._encodings = encodings
        self.n_sequences = 1


def x() -> Tensor:
    return torch.arange(14).view(7, 2)


MAKES: list[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = [
    (lambda x: x, lambda b: b),
    (lambda x: {"x": x, "note": "all", "rate": 0.5, "none": None}, lambda b: b["x"]),
    (lambda x: OrderedDict(x=x), lambda b: b["x"]),
    (lambda x: defaultdict(list, x=x), lambda b: b["x"]),
    (lambda x: MappingProxyType({"x": x}), lambda b: b["x"]),
    (lambda x: Encoding({"x": x}, list("abcdefg")), lambda b: b["x"]),
    (lambda x: [x, {"y": [x, (x, 3)]}], lambda b: b[1]["y"][1][0]),
    (lambda x: (x, x.numpy(), (224, 224)), lambda b: torch.from_numpy(b[1])),
    (lambda x: Pair(x, x[:, 0]), lambda b: b.x),
    (lambda x: {"a": Frozen(x, 2.0), "ids": list("abcdefg")}, lambda b: b["a"].x),
]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("number", range(len(MAKES)))
def test_every_make(number: int, size: int) -> None:
    make, read = MAKES[number]
    whole = x()
    batch = make(whole)
    parts = mbkern.micro_batches(batch, size)
    assert len(parts) == len(list(parts)) == -(-7 // size)
    assert sum(parts.sizes) == parts.items == 7
    assert all(type(part) is type(batch) for part in parts)
    assert torch.equal(torch.cat([read(part) for part in parts]), whole)
    views = [read(part).data_ptr() - whole.data_ptr() for part in parts]
    assert views == [size * 16 * k for k in range(len(parts))]
    assert torch.equal(read(batch), whole), "the batch itself is as it was"


def test_what_is_passed_on_and_what_is_cut() -> None:
    batch = {
        "x": x(), "scalar": torch.tensor(2.0), "size": (224, 224), "names": ("a",) * 7,
        "labels": [torch.tensor(k) for k in range(7)], "meta": [{"k": k} for k in range(7)],
        "empty": [], "object": SimpleNamespace(x=x()), "mixed": [x(), 0.5, torch.tensor(1)],
        "array": np.float64(3), "texts": np.array(list("abcdefg")), "type": Frozen,
    }  # fmt: skip
    last = mbkern.micro_batches(batch, 3)[-1]
    assert last["scalar"] is batch["scalar"]
    assert last["size"] == (224, 224)
    assert last["names"] == ("a",)
    assert last["labels"] == [torch.tensor(6)]
    assert last["meta"] == [{"k": 6}]
    assert last["empty"] == []
    assert last["object"] is batch["object"]
    assert len(last["mixed"][0]) == 1
    assert last["mixed"][1:] == [0.5, torch.tensor(1)]
    assert last["texts"].tolist() == ["g"]
    assert last["type"] is Frozen


def test_attributes_stay_beside_what_is_cut() -> None:
    encoding = Encoding({"x": x()}, list("abcdefg"))
    second = mbkern.micro_batches(encoding, 3)[1]
    assert (second._encodings, second.n_sequences) == (list("def"), 1)
    frozen = mbkern.micro_batches(Frozen(x(), 2.0), 3)[1]
    assert (frozen.scale, frozen.computed) == (2.0, x().sum()), "no __post_init__ of a part"


def test_a_sequence() -> None:
    parts = mbkern.micro_batches(x(), np.int64(3))
    assert [len(p) for p in parts[1:]] == [3, 1]
    assert len(parts[-3]) == 3
    assert "3 of 3, 7 items" in repr(parts)
    with pytest.raises(IndexError, match="micro-batch 3 of 3"):
        parts[3]
    assert list(mbkern.micro_batches(x()[:0], 3)) == []
    assert len(mbkern.micro_batches(x(), SimpleNamespace(micro_batch=4))) == 2


def test_gradients_reach_the_batch() -> None:
    whole = torch.ones(5, 2, requires_grad=True)
    for part in mbkern.micro_batches((whole,), 2):
        part[0].sum().backward()
    assert torch.equal(whole.grad, torch.ones(5, 2))


def test_refusals() -> None:
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (x(), 0, ValueError, "is 0; it must be at least 1"),
        (x(), -2, ValueError, "is -2"),
        (x(), 2.0, TypeError, "float 2.0"),
        (x(), True, TypeError, "not True"),
        ({"a": "text", "b": torch.tensor(1)}, 2, ValueError, "nothing to cut"),
        (["a", "b"], 2, ValueError, "nothing to cut.* list"),
        ({"x": x(), "y": x()[:5]}, 2, ValueError, r"batch\['x'\] has 7 .*batch\['y'\] has 5"),
        ([x(), ({"n": ["a", "b"]},)], 2, ValueError, r"batch\[1\]\[0\]\['n'\] has 2"),
        ([x(), ["a"]], 2, ValueError, r"batch\[0\] has 7 items and batch\[1\] has 1"),
        (
            {"texts": [torch.ones(3), torch.ones(4)]},
            2, ValueError, r"'texts'\]\[0\] has 3 .*a tensor for each item must be stacked",
        ),
        (Pair(x(), x()[:1]), 2, ValueError, r"batch\.x has 7 items and batch\.y has 1"),
        ([x().to_sparse()], 2, TypeError, r"batch\[0\] is of layout torch.sparse_coo"),
        (
            torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)]),
            2, TypeError, "PackedSequence",
        ),
    ]  # fmt: skip
    for batch, size, error, message in cases:
        with pytest.raises(error, match=message):
            mbkern.micro_batches(batch, size)
