"""A tokenizer's batch, as transformers makes it, cut into micro-batches."""

from __future__ import annotations

import pytest
import torch

import mbkern

pytestmark = pytest.mark.cpu


def test_batch_encoding() -> None:
    transformers = pytest.importorskip("transformers", reason="see make integrations")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[PAD]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    texts = ["a", "a b", "b c a", "c", "b b"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    parts = mbkern.micro_batches(batch, 2)
    assert parts.sizes == [2, 2, 1]
    for name in batch:
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    for k, part in enumerate(parts):
        assert type(part) is transformers.BatchEncoding
        assert part.is_fast
        assert torch.equal(part.input_ids, part["input_ids"])
        for row in range(len(part.input_ids)):
            assert part.tokens(row) == batch.tokens(2 * k + row)
    assert parts[1].to("cpu").input_ids.shape == (2, 3)
