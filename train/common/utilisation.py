"""Model FLOPs utilisation: the share of a GPU's peak that a model's own operations reach."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_tnt import TNTConfig
from modeling_tnt.cache import LAYER_TYPE, fast_weight_shapes

from .costs import FORWARD, attention_operations, memory_operations, muon_operations

# Dense peak of the vendors' data sheets, operations a second with bfloat16 operands.
_PEAK_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "A40": 150e12,
    "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A10": 125e12, "V100": 125e12,
}  # fmt: skip


def peak_operations(device: torch.device) -> float | None:
    """bfloat16 operations a second of a GPU by its name; None for a CPU and for an unknown one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_BF16.items() if key in name), None)


def operations_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Floating-point operations of a training step per token: three times those of a forward pass.

    A forward pass has two for each weight of a linear layer, and what `costs` counts for memories or attention.
    What an implementation computes twice is not counted.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    weights = sum(w.numel() for w in linear if id(w) not in embeddings)
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in embeddings:
        weights += head.weight.numel()
    return 3 * (2 * weights + _mixer_operations(model, seq_len))


def _mixer_operations(model: PreTrainedModel, seq_len: int) -> float:
    config = model.config
    attention = partial(attention_operations, FORWARD, head_dim=config.head_dim)
    if not isinstance(config, TNTConfig):
        return config.num_hidden_layers * config.num_attention_heads * attention(length=seq_len)
    memories = config.layer_types.count(LAYER_TYPE)
    lengths = [_seen(kind, config, seq_len) for kind in config.layer_types if kind != LAYER_TYPE]
    if config.memory_as is not None:
        kind = "segment_attention" if config.memory_as == "context" else "sliding_attention"
        lengths += [_seen(kind, config, seq_len)] * memories
    operations = config.num_attention_heads * sum(attention(length=length) for length in lengths)
    operations += config.num_heads * memories * _memory_operations(config)
    if config.memory_as == "context":
        operations += memories * _recall_operations(model)
    return operations


def _seen(kind: str, config: TNTConfig, seq_len: int) -> float:
    """Keys that a token attends to on average, times two: the length of causal attention without a window that would
    do as much."""
    persistent = 2 * config.num_persistent_tokens
    if kind == "full_attention":
        return seq_len + persistent
    if kind == "segment_attention":  # its own tokens, and as many that the memory has said
        return 2 * min(config.global_chunk_size, seq_len) + persistent
    window = min(config.sliding_window, seq_len)
    return window * (2 * seq_len - window) / seq_len + persistent  # the first ones see less than a window


def _memory_operations(config: TNTConfig) -> float:
    """Of all memories of a block, per token and head."""
    shape = {"memory": config.memory_type, "head_dim": config.head_dim, "expansion": config.memory_expansion}
    shape["depth"] = config.memory_depth
    operations = sum(
        memory_operations(FORWARD, chunk_size=chunk_size, qk_projection=config.qk_projection, **shape)
        for chunk_size in config.local_chunk_sizes
    )
    if config.global_chunk_size is not None:
        # Its tokens read the state before the chunk, so that there are no products within one.
        operations += memory_operations(FORWARD, chunk_size=0, qk_projection="none", **shape)
    if config.global_update == "muon":
        matrices = [shape[1:] for shape in fast_weight_shapes(config).values() if len(shape) == 3]
        operations += muon_operations(FORWARD, matrices=matrices, chunk_size=config.global_chunk_size)
    return operations


def _recall_operations(model: PreTrainedModel) -> float:
    """What the memories of a block say to a segment, per token: at its queries, through their output projection, and
    keys and values of it."""
    config, layer = model.config, next(iter(model.memory_layers().values()))
    attention = model.base_model.layers[0].self_attn
    fast = sum(math.prod(shape) for shape in fast_weight_shapes(config).values() if len(shape) == 3)
    projections = (layer.q_proj, layer.o_proj, attention.k_proj, attention.v_proj)
    return 2 * (fast + sum(project.weight.numel() for project in projections))
