"""Bits per byte, the bigram baseline and the sample."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from modeling_tnt.train.data import Document, pack
from modeling_tnt.train.evaluate import bigram_bits_per_byte, bits_per_byte, generate_sample

TRAIN = [Document(t, t) for t in ("abab", "aç", "")]
VALIDATION = [Document(t, t) for t in ("abç", "zb")]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A stand-in: evaluation relies on nothing but the interface of transformers' models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_bigram_against_its_formula():
    stream = [*b"abab", 256, *"aç".encode(), 256, 256]
    pairs, firsts, singles = Counter(zip(stream, stream[1:], strict=False)), Counter(stream[:-1]), Counter(stream)

    def probability(a: int, b: int) -> float:
        unigram = (singles[b] + 1) / (len(stream) + 257)
        successors = sum(1 for pair in pairs if pair[0] == a)
        return (pairs[a, b] + successors * unigram) / (firsts[a] + successors) if firsts[a] else unigram

    scored = [*"abç".encode(), 256, *b"zb", 256]
    bits = -sum(math.log2(probability(a, b)) for a, b in zip(scored, scored[1:], strict=False))
    got = bigram_bits_per_byte(TRAIN, VALIDATION, limit_bytes=100)
    # float64 on both sides; 5 bytes are predicted: those of both texts but the first.
    assert got == pytest.approx(bits / 5, rel=1e-12)
    assert bigram_bits_per_byte(TRAIN, VALIDATION, limit_bytes=2) != got


def test_bits_per_byte_against_the_logits(model):
    rows = pack([Document("k", "some text, with ü, for a test " * 4)], ByT5Tokenizer()).rows(20)
    ids = rows.tokens.long()
    log_p = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    want = -log_p.sum().item() / math.log(2) / rows.token_bytes[:, 1:].sum().item()
    seen = []
    # The batch size only changes the order of float32 sums over some hundred terms.
    for batch_size in (1, 4, 100):
        assert bits_per_byte(model, rows, batch_size=batch_size, on_batch=seen.append) == pytest.approx(want, rel=1e-5)
    assert sum(seen) == 3 * len(rows.tokens)
    # An untrained model over 384 tokens: about log2(384) = 8.6 bits.
    assert want == pytest.approx(math.log2(384), abs=0.3)


def test_evaluation_leaves_the_mode_of_the_model(model):
    rows = pack([Document("k", "abcdefgh")], ByT5Tokenizer()).rows(4)
    for training in (True, False):
        model.train(training)
        bits_per_byte(model, rows, batch_size=2)
        assert model.training == training


def test_the_sample_is_a_function_of_the_seed(model):
    tokenizer = ByT5Tokenizer()
    prompt = torch.tensor(tokenizer("def f(", add_special_tokens=False).input_ids)
    first, again, other = (generate_sample(model, tokenizer, prompt, new_tokens=30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] == "def f(" and first[1]
