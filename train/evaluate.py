"""Bits per byte of a model and of the byte bigram model that it must beat, and a generated sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Document, PackedTokens

END_OF_DOCUMENT = 256  # the symbol after the 256 byte values


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, rows: PackedTokens, *, batch_size: int, on_batch: Callable[[int], None] | None = None
) -> float:
    """Σ −log2 p(token) / number of UTF-8 bytes of those tokens, over all but the first token of each row.

    Args:
        model: a causal language model; its loss is the mean over predicted tokens, in nats.
        rows: [rows, seq_len] tokens and their bytes. An end-of-sequence token costs bits and has no bytes.
        batch_size: rows per forward pass.
        on_batch: called with the number of rows after each forward pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = 0.0
    for tokens in rows.tokens.split(batch_size):
        input_ids = tokens.long().to(device)
        nats += model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.item() * tokens[:, 1:].numel()
        if on_batch is not None:
            on_batch(len(tokens))
    model.train(was_training)
    return nats / math.log(2) / rows.token_bytes[:, 1:].double().sum().item()


def bigram_bits_per_byte(train: list[Document], validation: list[Document], *, limit_bytes: int) -> float:
    """Bits per byte of a bigram model of bytes with Witten-Bell smoothing, trained on `train`.

    `P(b|a) = (c(ab) + n(a) P(b)) / (c(a) + n(a))`, n(a) being the number of different successors of a seen in training
    (Witten and Bell 1991), `P(b)` the unigram distribution with one added to each of the 257 counts.

    Args:
        train, validation: documents; the end of a document is a symbol of its own that costs bits and has no bytes.
        limit_bytes: only the first so many bytes of `validation` are scored, to compare on the text of another model.
    """
    symbols = END_OF_DOCUMENT + 1
    stream = _byte_stream(train)
    pairs = stream[:-1].astype(np.int64) * symbols + stream[1:]
    counts = np.bincount(pairs, minlength=symbols * symbols).reshape(symbols, symbols).astype(np.float64)
    unigram = (np.bincount(stream, minlength=symbols) + 1.0) / (len(stream) + symbols)
    seen, successors = counts.sum(axis=1, keepdims=True), (counts > 0).sum(axis=1, keepdims=True)
    smoothed = (counts + successors * unigram) / np.maximum(seen + successors, 1)
    smoothed[seen[:, 0] == 0] = unigram
    scored = _byte_stream(validation)[: limit_bytes + 1]
    bits = -np.log2(smoothed[scored[:-1], scored[1:]]).sum()
    return float(bits / (scored[1:] != END_OF_DOCUMENT).sum())


def _byte_stream(documents: list[Document]) -> np.ndarray:
    """The UTF-8 bytes of the documents as uint16 symbols, each document followed by END_OF_DOCUMENT."""
    parts = []
    for _, text in documents:
        parts += [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16), np.uint16([END_OF_DOCUMENT])]
    return np.concatenate(parts)


@torch.no_grad()
def generate_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, *, new_tokens: int, seed: int
) -> tuple[str, str]:
    """Continue the tokens `prompt` [T] by sampling (temperature 0.8, top-k 40). Returns the prompt and what follows."""
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    input_ids = prompt.long()[None].to(next(model.parameters()).device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=min(new_tokens, 16),
        do_sample=True,
        temperature=0.8,
        top_k=40,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    continuation = output[0, input_ids.shape[1] :]
    return tokenizer.decode(prompt, skip_special_tokens=True), tokenizer.decode(continuation, skip_special_tokens=True)
