"""Small models for the tests: every option once, in few combinations."""

import torch

from modeling_tnt import TNTConfig, TNTForCausalLM

VOCAB = 40
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "global_chunk_size": 8, "local_chunk_sizes": [4], "local_shard_lengths": 8,
    # Large step sizes and weights, so that what the memories have learned shows in the logits.
    "initializer_range": 0.2, "memory_base_lr": 0.5, "global_memory_base_lr": 0.5,
}  # fmt: skip
HYBRIDS = (
    "hybrid-full", "hybrid-sliding", "hybrid-windows", "titans-mal", "titans-mag", "titans-mac", "titans-mac-global",
)  # fmt: skip
VARIANTS = {
    "mlp": {},
    "linear": {"memory_type": "linear"},
    "mlp-momentum-forget": {"use_momentum": True, "use_forget_gate": True, "normalize_projection": True},
    "linear-momentum-chunk": {"memory_type": "linear", "use_momentum": True, "qk_projection": "chunk"},
    "mlp-token-scale": {"token_scale": True, "qk_projection": "none", "global_chunk_size": None},
    "linear-plain-two-locals": {
        "memory_type": "linear", "memory_bias": False, "memory_residual_norm": False, "memory_base_lr": 0.1,
        "global_memory_base_lr": 0.1, "conv_kernel_size": 0, "use_output_gate": False, "local_chunk_sizes": [2, 4],
        "local_shard_lengths": [8, None], "use_forget_gate": True,
    },
    "swiglu-forget": {"memory_type": "swiglu", "use_forget_gate": True, "memory_base_lr": 0.2},
    "mlp-three-maps-momentum": {"memory_depth": 3, "use_momentum": True, "memory_base_lr": 0.2},
    "mlp-muon": {"global_update": "muon", "use_momentum": True, "use_forget_gate": True, "local_shard_lengths": None},
    "hybrid-full": {
        "layer_types": ["memory", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2,
        "use_momentum": True,
    },
    "hybrid-sliding": {
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "memory", "full_attention"], "sliding_window": 5,
    },
    "hybrid-windows": {
        "layer_types": ["sliding_attention", "memory"], "sliding_window": 4, "num_key_value_heads": 1,
    },
    "titans-mal": {"memory_as": "layer", "sliding_window": 5, "num_persistent_tokens": 3, "num_attention_heads": 1},
    "titans-mag": {
        "memory_as": "gate", "sliding_window": 5, "num_persistent_tokens": 2, "use_momentum": True,
        "use_forget_gate": True, "global_chunk_size": None, "local_shard_lengths": None,
    },
    "titans-mac": {"memory_as": "context", "num_persistent_tokens": 2, "use_momentum": True},
    "titans-mac-global": {
        "memory_as": "context", "local_chunk_sizes": [], "qk_projection": "none", "num_attention_heads": 4,
        "num_key_value_heads": 2, "use_forget_gate": True, "conv_kernel_size": 0,
    },
    "global-only": {"local_chunk_sizes": [], "qk_projection": "none", "tie_word_embeddings": True},
}  # fmt: skip

MEMORIES_ALONE = [name for name in VARIANTS if name not in HYBRIDS]
# Whose cache does not grow: there are states of them.
CONSTANT_SIZE = [name for name in VARIANTS if name not in ("hybrid-full", "hybrid-sliding")]
TORCH_ONLY = ("swiglu-forget", "mlp-three-maps-momentum")  # kinds of memory that Triton's kernels do not run


def make_model(variant: str = "mlp", dtype: torch.dtype = torch.float64, **overrides) -> TNTForCausalLM:
    """A model in evaluation mode, always the same for the same arguments."""
    torch.manual_seed(0)
    return TNTForCausalLM(TNTConfig(**SMALL | VARIANTS[variant] | overrides)).to(dtype).eval()


def make_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids above 0, which is left to padding."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def state_tensors(cache) -> dict[str, torch.Tensor]:
    """Every tensor of the memories of a cache by name."""
    tensors = {}
    for i, layer in enumerate(cache.layers):
        if not hasattr(layer, "memories"):
            continue  # keys and values of attention are of columns, padding included
        for name, state in layer.memories.items():
            tensors |= {f"{i}.{name}.{k}": v for k, v in state.tensors().items()}
        if layer.conv_tail is not None:
            tensors[f"{i}.conv_tail"] = layer.conv_tail
    return tensors


def assert_same_states(cache, expected, rows: slice = slice(None), **tolerance) -> None:
    """All tensors of `cache` equal the given rows of those of `expected`."""
    ours, theirs = state_tensors(cache), state_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name][rows], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
