"""The bigram model of tokens, a baseline that any language model must beat."""

from __future__ import annotations

import numpy as np

from .tokens import NO_LABEL, Rows, Tokens

LARGEST_VOCABULARY = 1024
CHUNK = 1 << 24  # tokens counted at a time


def token_bigram_bits_per_byte(train: Tokens, validation_rows: Rows) -> float:
    """Bits per byte of a bigram model of tokens with Witten-Bell smoothing, trained on `train`.

    `P(b|a) = (c(ab) + n(a) P(b)) / (c(a) + n(a))`, n(a) being the number of different successors of a seen in training
    (Witten and Bell 1991), `P(b)` the unigram distribution with one added to the count of each token that text can
    become. With ByT5's tokens that is the bigram model of bytes. Scored as a model is: Σ −log2 P(b|a) over all tokens
    of a row that have a label but the first, divided by the UTF-8 bytes that these tokens stand for.

    Raises ValueError for a vocabulary of more than 1024 tokens: the counts of pairs grow with its square, and the
    estimate is only good where most pairs occur.
    """
    size = train.vocabulary.size
    if size > LARGEST_VOCABULARY:
        raise ValueError(
            f"a bigram model of {size:,} tokens would need {size:,} x {size:,} counts, most of them of pairs that "
            f"never occur; use a tokenizer with at most {LARGEST_VOCABULARY}, such as byt5"
        )
    counts, single = _count(train)
    # A token that text was not expected to become, such as an unknown one, takes part when it occurs.
    unigram = (single + 1) / (train.num_tokens + max(train.vocabulary.num_symbols, np.count_nonzero(single)))
    seen, successors = counts.sum(axis=1, keepdims=True), (counts > 0).sum(axis=1, keepdims=True)
    smoothed = (counts + successors * unigram) / np.maximum(seen + successors, 1)
    smoothed[seen[:, 0] == 0] = unigram
    bits = num_bytes = 0.0
    for index in range(len(validation_rows)):
        row = validation_rows[index]
        tokens, scored = row["input_ids"].numpy(), row["labels"].numpy()[1:] != NO_LABEL
        bits -= np.log2(smoothed[tokens[:-1], tokens[1:]][scored]).sum()
        num_bytes += validation_rows.token_bytes(index).numpy()[1:][scored].sum(dtype=np.float64)
    return float(bits / num_bytes)


def _count(train: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair of neighbours occurs, float64 [V, V], and each token, float64 [V]."""
    size = train.vocabulary.size
    pairs, single = np.zeros(size * size), np.zeros(size)
    for begin in range(0, train.num_tokens, CHUNK):
        part = train.tokens[begin : begin + CHUNK + 1].astype(np.int64)  # the last one begins the next part
        pairs += np.bincount(part[:-1] * size + part[1:], minlength=size * size)
        single += np.bincount(part[:CHUNK], minlength=size)
    return pairs.reshape(size, size), single
