"""The models that `tnt bench model` trains, of one size: TNT, the same as a Titans model, and a Llama."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_tnt import TNTConfig, TNTForCausalLM

LLAMA_WIDTH_STEP = 64  # of the feed-forward layer, so that its matrices stay a good size for tensor cores


def make_tnt_config(preset: str, chunk_size: int, backend: str) -> TNTConfig:
    """The preset with one local memory of this chunk size. Raises ValueError if the two do not fit."""
    return TNTConfig.from_preset(preset, local_chunk_sizes=[chunk_size], kernel_backend=backend)


def make_titans_config(preset: str, chunk_size: int, backend: str) -> TNTConfig:
    """The preset as a Titans model: `titans-150m` is `tnt-150m` with these changes. Raises ValueError as above."""
    return TNTConfig.from_preset(
        preset, global_chunk_size=None, local_chunk_sizes=[chunk_size], local_shard_lengths=None,
        qk_projection="none", use_momentum=True, use_forget_gate=True, kernel_backend=backend,
    )  # fmt: skip


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
