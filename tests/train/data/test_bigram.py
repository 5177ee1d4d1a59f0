"""The bigram baseline against its formula."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from modeling_tnt.train.data import Tokens, bigram, token_bigram_bits_per_byte
from modeling_tnt.train.data.encode import Encoder

END = 256  # a symbol after the 256 byte values


def _tokens(*texts: str) -> Tokens:
    encoder = Encoder(ByT5Tokenizer())
    documents = encoder(list(texts))
    starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
    return Tokens(np.concatenate(documents), starts, np.array([len(t.encode()) for t in texts]), encoder.vocabulary)


def _probability(stream: list[int], a: int, b: int) -> float:
    pairs, firsts, singles = Counter(zip(stream, stream[1:], strict=False)), Counter(stream[:-1]), Counter(stream)
    unigram = (singles[b] + 1) / (len(stream) + 257)
    successors = sum(1 for pair in pairs if pair[0] == a)
    return (pairs[a, b] + successors * unigram) / (firsts[a] + successors) if firsts[a] else unigram


def test_of_byt5_it_is_the_bigram_model_of_bytes(monkeypatch: pytest.MonkeyPatch):
    stream = [*b"abab", END, *"aç".encode(), END, END]
    train, validation = _tokens("abab", "aç", ""), _tokens("abç", "zb")
    row = [*"abç".encode(), END, *b"zb", END]
    joined = -sum(math.log2(_probability(stream, a, b)) for a, b in zip(row, row[1:], strict=False))
    # float64 on both sides; 5 bytes are predicted: those of both texts but the first.
    got = token_bigram_bits_per_byte(train, validation.rows(8))
    assert got == pytest.approx(joined / 5, rel=1e-12)
    monkeypatch.setattr(bigram, "CHUNK", 3)  # counted in parts, no pair is lost between two
    assert token_bigram_bits_per_byte(train, validation.rows(8)) == got
    # Marked, "z" is not predicted from the end before it, and its byte is not counted.
    marked = joined + math.log2(_probability(stream, END, ord("z")))
    assert token_bigram_bits_per_byte(train, validation.rows(8, "marked")) == pytest.approx(marked / 4, rel=1e-12)
    # In rows of 4 the second begins with the end of the first text, which is then not predicted.
    two_rows = joined + math.log2(_probability(stream, "ç".encode()[-1], END))
    assert token_bigram_bits_per_byte(train, validation.rows(4)) == pytest.approx(two_rows / 5, rel=1e-12)


def test_a_large_vocabulary_is_refused():
    tokens = _tokens("ab")
    tokens.vocabulary = tokens.vocabulary._replace(size=1025)
    with pytest.raises(ValueError, match="1,025 x 1,025 counts"):
        token_bigram_bits_per_byte(tokens, tokens.rows(2))
