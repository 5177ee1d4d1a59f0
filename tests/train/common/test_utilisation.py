"""Operations of a training step and the peak of a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.common.utilisation import operations_per_token, peak_operations


def test_a_llama_by_hand():
    """Per token and layer: four projections, three matrices of the SwiGLU, half of the attention; then the head."""
    D, F, V, T = 32, 64, 100, 128
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    forward = 2 * (2 * (4 * D * D + 3 * D * F) + 4 * 2 * T * 8) + 2 * D * V
    assert operations_per_token(LlamaForCausalLM(config), T) == 3 * forward


def test_a_tnt_by_hand():
    """Linear memories of D × D: three products of 2·D² each, and with chunks of C two of 2·C·D within a chunk; the
    global memory, whose tokens read the state before their chunk, has none of these. Gates are linear layers, too."""
    D, C, H, V = 16, 4, 2, 50
    config = TNTConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=1, num_heads=H, head_dim=D, intermediate_size=48,
        memory_type="linear", qk_projection="none", global_chunk_size=8, local_chunk_sizes=[C], local_shard_lengths=8,
    )  # fmt: skip
    linear = 5 * 32 * 32 + 3 * 32 * 48 + 2 * 32 * H + 32 * V
    memories = H * (2 * 3 * 2 * D * D + 2 * C * 2 * D)
    assert operations_per_token(TNTForCausalLM(config), 64) == 3 * (2 * linear + memories)
    config.global_update = "muon"  # five times three products of D × D matrices, once in 8 tokens
    memories += H * 5 * 3 * 2 * D**3 / 8
    assert operations_per_token(TNTForCausalLM(config), 64) == 3 * (2 * linear + memories)


def hybrid(**changes) -> TNTForCausalLM:
    return TNTForCausalLM(TNTConfig(**{
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "memory_type": "linear", "qk_projection": "none", "global_chunk_size": 8,
        "local_chunk_sizes": [], "local_shard_lengths": None,
    } | changes))  # fmt: skip


def test_attention_alone_takes_what_a_llama_takes():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2,
    )  # fmt: skip
    model = hybrid(layer_types=["full_attention"] * 2, num_attention_heads=4, num_key_value_heads=2)
    assert operations_per_token(model, 64) == operations_per_token(LlamaForCausalLM(config), 64)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"layer_types": ["memory", "full_attention"]}, sum(range(1, 65)) / 64),
        ({"layer_types": ["memory", "sliding_attention"], "sliding_window": 16}, (sum(range(1, 17)) + 48 * 16) / 64),
        (
            {"memory_as": "gate", "sliding_window": 16, "num_persistent_tokens": 3},
            2 * (3 + (sum(range(1, 17)) + 48 * 16) / 64),
        ),
        ({"memory_as": "context", "num_persistent_tokens": 3}, 2 * (3 + 2 * sum(range(1, 9)) / 8)),
    ],
    ids=["full", "sliding", "gate", "context"],
)
def test_a_hybrid_by_hand(changes: dict, keys: float):
    """keys: those that a token sees on average in all layers, with half a token more for each row of them, which the
    cost of attention leaves out. Two products for each, of D multiply-adds; the rest is linear layers and memories."""
    D, H, T = 16, 2, 64
    model = hybrid(**changes)
    memories = len(model.memory_layers())
    embeddings = {id(model.model.embed_tokens.weight)}
    linear = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m.weight) not in embeddings
    )
    forward = 2 * linear + memories * H * 3 * 2 * D * D
    if model.config.memory_as == "context":  # M_before(q), its projection, keys and values of it
        forward += memories * 2 * (H * D * D + 4 * 32 * 32)
    attention = operations_per_token(model, T) / 3 - forward
    assert attention == pytest.approx(H * 2 * 2 * D * keys, rel=0.1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12),
     ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA A10G", 125e12), ("Some other card", None)],
)  # fmt: skip
def test_the_peak_of_a_gpu(monkeypatch, name: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_operations(torch.device("cuda", 0)) == peak
    assert peak_operations(torch.device("cpu")) is None
