"""Real text without a network: the source of Python's standard library, as token ids."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

IGNORE = -100  # cross-entropy's default ignore_index


class Batch(NamedTuple):
    """Sequences of token ids (n, context) and, position by position, the token that follows."""

    inputs: Tensor
    targets: Tensor

    @property
    def items(self) -> int:
        """The positions that count: those that are not padding."""
        return int((self.targets != IGNORE).sum())

    def cut(self, sizes: tuple[int, ...]) -> list[Batch]:
        """Micro-batches of the given numbers of sequences."""
        return [Batch(*pair) for pair in zip(*(t.split(list(sizes)) for t in self), strict=True)]


class Text(NamedTuple):
    """The corpus: all of it in windows of one length, and its paragraphs, of many lengths."""

    windows: Tensor
    paragraphs: list[list[int]]
    facts: dict[str, str | int]

    def window_batch(self, n: int, generator: torch.Generator) -> Batch:
        """Draw ``n`` windows; every position counts."""
        rows = self.windows[torch.randint(len(self.windows), (n,), generator=generator)]
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def paragraph_batch(self, n: int, context: int, generator: torch.Generator) -> Batch:
        """Draw ``n`` paragraphs, cut off after ``context`` positions, padded and ignored there."""
        inputs = torch.zeros(n, context, dtype=torch.int64)
        targets = torch.full((n, context), IGNORE)
        for row, number in enumerate(torch.randperm(len(self.paragraphs), generator=generator)[:n]):
            ids = torch.tensor(self.paragraphs[number][: context + 1])
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
        return Batch(inputs, targets)


def load(corpus_bytes: int, vocabulary: int, context: int) -> Text:
    """Read modules in the order of their names, train a byte-level BPE on them, encode them."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for file in sorted(folder.glob("*.py")):
        if sum(map(len, texts)) >= corpus_bytes:
            break
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
    if not texts:
        raise SystemExit("demo: this Python carries no source of its standard library to train on")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)

    blocks = [block for text in texts for block in text.split("\n\n")]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(blocks)]
    ids = torch.tensor([i for block in encoded for i in block])
    whole = len(ids) // (context + 1) * (context + 1)
    facts: dict[str, str | int] = {
        "modules": len(texts),
        "characters": sum(map(len, texts)),
        "sha256": hashlib.sha256("".join(texts).encode(errors="replace")).hexdigest(),
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens": len(ids),
    }
    # Four tokens or more: shorter paragraphs are a bracket or a keyword, and teach nothing.
    paragraphs = [block for block in encoded if len(block) >= 4]
    return Text(ids[:whole].view(-1, context + 1), paragraphs, facts)
