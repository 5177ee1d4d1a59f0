"""The Llama that TNT models are compared with."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_tnt import TNTConfig, TNTForCausalLM

LLAMA_WIDTH_STEP = 64  # of the feed-forward layer, so that its matrices stay a good size for tensor cores


def make_llama_config(config: TNTConfig, max_length: int) -> LlamaConfig:
    """A Llama of `config`'s width, depth, heads and vocabulary, and of about as many parameters."""
    with torch.device("meta"):
        wanted = TNTForCausalLM(config).num_parameters()

    def llama(width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_heads, head_dim=config.head_dim,
            intermediate_size=width, max_position_embeddings=max_length, rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings, use_cache=False, attn_implementation="sdpa",
            pad_token_id=config.pad_token_id, bos_token_id=None, eos_token_id=config.eos_token_id,
            initializer_range=config.initializer_range,
        )  # fmt: skip

    with torch.device("meta"):
        base = LlamaForCausalLM(llama(LLAMA_WIDTH_STEP)).num_parameters()
    # Three matrices of the feed-forward layer grow with its width.
    per_step = 3 * config.num_hidden_layers * config.hidden_size * LLAMA_WIDTH_STEP
    return llama(LLAMA_WIDTH_STEP * max(1, 1 + round((wanted - base) / per_step)))


def build_llama(config: TNTConfig, max_length: int) -> PreTrainedModel:
    return LlamaForCausalLM(make_llama_config(config, max_length))
